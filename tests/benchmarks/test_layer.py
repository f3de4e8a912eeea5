from dataclasses import replace

import pytest
import torch

MEASURED = {"median_ms", "p20_ms", "p80_ms", "peak_bytes", "resident_bytes", "rounds", "timing"}
MACHINE = {"device", "threads", "driver", "torch", "triton", "commit", "implementation"}
CEILINGS = {"copy_gbps", "matmul_tflops"}


def test_competitors_compute_the_same_gradients(bench, small_case):
    layer_case, (case, inputs) = bench("layer_case"), small_case
    players = layer_case.competitors(("eager", "fused", "checkpointed"), (), mixed=False)
    steps = [
        layer_case.LayerStep(player.function(case.num_heads), inputs, False) for player in players
    ]
    eager, *others = (step() for step in steps)
    assert len(others) == 6 and all(gradient.abs().max() > 0 for gradient in eager)
    for gradients in others:
        torch.testing.assert_close(gradients, eager, rtol=1e-3, atol=1e-4)


def test_competitors_stand_in_the_order_asked_for(bench):
    players = bench("layer_case").competitors(
        ("compiled_budget", "eager", "fused"), (0.9, 0.2), mixed=False
    )
    names = [player.recompute or player.budget or player.impl for player in players]
    assert names == [0.9, 0.2, "eager", "none", "attention", "mlp", "qkv", "layer"]


def test_a_layer_names_every_implementation_of_its_ops(bench, monkeypatch):
    def implementation(device, op):
        return "cpp" if op == "gelu_bwd" else "torch"

    layer_case = bench("layer_case")
    monkeypatch.setattr(layer_case, "implementation", implementation)
    expected = {"fused": "cpp + torch", "eager": "torch", "compiled": "inductor"}
    for impl, name in expected.items():
        assert layer_case.Competitor(impl).implementation(torch.device("cpu")) == name


def test_autocast_has_the_policy_that_rounds_and_units_of_what_it_computes_in(bench):
    layer_case = bench("layer_case")
    case = layer_case.LayerCase(2, 8, 16, 2, 64, "autocast")
    assert case.unit_bytes == 2 * 8 * 16 * 2
    players = layer_case.competitors(("fused",), (), mixed=case.autocast)
    assert players[-1].recompute == "layer_narrow"
    inputs = layer_case.make_inputs(case, torch.device("cpu"))
    assert {t.dtype for t in (inputs.x, inputs.dout, *inputs.parameters)} == {torch.float32}
    assert inputs.modulation.dtype == torch.bfloat16
    fused, eager = (
        layer_case.LayerStep(player.function(case.num_heads), inputs, True)
        for player in (players[0], layer_case.Competitor("eager"))
    )
    assert fused.forward().dtype == eager.forward().dtype == torch.float32
    for actual, expected in zip(fused(), eager(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.2)
    assert not torch.equal(eager.forward(), eager._replace(autocast=False).forward())


def test_inputs_are_the_same_ones_every_time(bench, small_case):
    case, inputs = small_case
    again = bench("layer_case").make_inputs(case, torch.device("cpu"))
    assert all(map(torch.equal, [*inputs.leaves, inputs.dout], [*again.leaves, again.dout]))


def test_inputs_are_drawn_where_they_are_used(bench, small_case, monkeypatch):
    def drawing(original):
        def draw(*shape, **options):
            devices.append((options["device"].type, options["generator"].device.type))
            return original(*shape, **options)

        return draw

    devices = []
    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, drawing(getattr(torch, name)))
    bench("layer_case").make_inputs(small_case[0], torch.device("cpu"))
    assert set(devices) == {("cpu", "cpu")} and len(devices) == 11


def test_each_competitor_is_compiled_once_and_each_budget_for_itself(
    bench, small_case, monkeypatch
):
    import torch._inductor.compile_fx as inductor

    def compile_fx(graph, inputs):
        budgets.append(torch._functorch.config.activation_memory_budget)
        return graph.forward

    budgets = []
    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    layer, case = bench("layer"), small_case[0]
    options = layer.Options(
        impls=("compiled_budget", "compiled"), budgets=(0.9, 0.2), rounds=2, device="cpu"
    )
    rows = layer.rows_of(case, options.players(case), options)
    assert budgets == [0.9, 0.2, 1.0] and [row["budget"] for row in rows] == [0.9, 0.2, None]


def test_flops_are_three_forwards(small_case):
    case = replace(small_case[0], B=1, T=1)
    projections = 3 * 16 * 16 + 16 * 16 + 2 * 16 * 64
    assert case.flops == 3 * (2 * projections + 2 * 2 * 16)
    assert case.unit_bytes == 64


def test_prints_a_line_for_every_policy_and_competitor(bench, layer_rows):
    fused = bench("layer_case").Competitor("fused").implementation(torch.device("cpu"))
    names = [row["recompute"] or row["impl"] for row in layer_rows]
    assert names == ["eager", "none", "attention", "mlp", "qkv", "layer", "checkpointed"]
    for row in layer_rows:
        assert row.keys() >= MEASURED | MACHINE | CEILINGS | {"saved_units", "achieved_tflops"}
        sizes = [row[name] for name in ("B", "T", "dim", "num_heads", "hidden")]
        assert sizes == [2, 32, 64, 2, 256]
        assert (row["dtype"], row["threads"], row["budget"]) == ("float32", 1, None)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["implementation"] == (fused if row["recompute"] else "torch")
        assert row["launches_forward"] > 0 and row["launches_backward"] > 0
        assert row["command"].startswith("python benchmarks/layer.py --rounds 2 --B 2 --T 32 ")


def test_saved_units_are_those_of_the_policies(layer_rows):
    units = {row["recompute"] or row["impl"]: row["saved_units"] for row in layer_rows}
    # the modulation is (B, 6 D), and logsumexp and statistics are H + 4 numbers for each token
    modulation, statistics, logsumexp = 6 / 32, 4 / 64, 2 / 64
    one_plus_scale = 2 / 32
    expected = {
        "eager": 20 + modulation + one_plus_scale + statistics + logsumexp,
        "none": 11 + modulation + statistics + logsumexp,
        "attention": 10 + modulation + statistics,
        "mlp": 7 + modulation + statistics + logsumexp,
        "qkv": 4 + modulation + statistics + logsumexp,
        "layer": 1 + modulation,
        "checkpointed": 1 + modulation,
    }
    assert units == pytest.approx(expected, rel=1e-5)  # of six printed digits


def test_inputs_are_resident_and_returned_gradients_are_in_the_peak(layer_rows):
    tokens, D, F = 2 * 32, 64, 256
    parameters = 4 * D * D + 2 * D * F + 3 * D + D + F + D
    gradients = 4 * (tokens * D + 2 * 6 * D + parameters)
    for row in layer_rows:
        assert row["resident_bytes"] == gradients + 4 * tokens * D  # and dout
        assert row["peak_bytes"] > gradients


def test_options_change_the_case_that_the_device_has(bench):
    options = bench("layer").Options
    (case,) = options(dim=128, T=32, dtype=("float32",), device="cpu").cases()
    assert (case.T, case.dim, case.num_heads, case.hidden) == (32, 128, 2, 512)
    cases = options(hidden=8, dtype=("float16", "float32"), device="cpu").cases()
    assert [(case.dtype, case.hidden) for case in cases] == [("float16", 8), ("float32", 8)]
