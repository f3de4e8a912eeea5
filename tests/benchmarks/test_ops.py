import sys

import pytest
import torch

CPU = torch.device("cpu")
PAIR = ("fused", "eager")
MEASURED = {"op", "impl", "implementation", "shape", "dtype", "direction", "median_ms", "p20_ms"}
MEASURED |= {"p80_ms", "bytes_moved", "allocated_bytes", "resident_bytes", "rounds", "timing"}


@pytest.fixture
def ops(bench, monkeypatch):
    """`benchmarks/ops.py` at small sizes."""
    for name in ("ops", "op_case", "attention_case", "kernel_cases"):
        for size, value in (("B", 2), ("T", 8)):
            monkeypatch.setattr(sys.modules.get(name) or bench(name), size, value, raising=False)
    monkeypatch.setattr(bench("ops"), "SHAPES", ((3, 1, 4, 4),))
    return bench("ops")


@pytest.fixture
def op_case(bench, ops):
    return bench("op_case")


@pytest.fixture
def rows_of(ops, bench):
    """The rows of a case, none of which is known."""

    def run(case, rounds=2):
        known = bench("program").Known(None, None)
        return list(ops.rows_of(case, rounds, ops.lacking_of(case, known)))

    return run


def test_every_op_with_a_kernel_is_timed(op_case):
    assert {(op, d) for op in op_case.INPUTS for d in ("fwd", "bwd")} == {
        (case.op, case.direction) for case in op_case.CASES.values() if case.timed
    }


BF16, F32 = torch.bfloat16, torch.float32
MIXED = {  # dtypes of the inputs and of the outputs beside a float32 stream
    "adaln_norm": ([F32, BF16, BF16], [BF16]),
    "gated_adaln_norm": ([F32, *[BF16] * 4], [F32, BF16]),
    "gated_residual": ([F32, BF16, BF16], [F32]),
}


@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
def test_every_op_computes_what_plain_torch_does(op_case, mixed):
    assert MIXED.keys() == set(op_case.STREAM)
    for op in MIXED if mixed else op_case.INPUTS:
        case = op_case.OpCase(op, 64, PAIR, CPU, mixed=mixed)
        calls = case.calls([case.inputs()])
        for direction in ("fwd", "bwd"):
            fused, eager = (op_case._as_tuple(calls[impl, direction][0]()) for impl in case.impls)
            torch.testing.assert_close(fused, eager, rtol=0.05, atol=0.05)
            if mixed:
                inputs, outputs = MIXED[op]
                assert [t.dtype for t in case.inputs()] == inputs
                assert [t.dtype for t in fused] == (outputs if direction == "fwd" else inputs)


def test_attention_of_two_streams_is_timed_beside_softmax_over_a_mask(ops, rows_of):
    case = ops.AttentionCase("two_stream_attention", 128, PAIR, CPU)
    calls = case.calls([case.inputs()])
    for direction in case.directions:
        fused, eager = (calls[impl, direction][0]() for impl in case.impls)
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)
    (forward, *_, backward) = rows_of(case)
    tokens = 2 * 8
    assert forward["bytes_moved"] == 4 * (4 * tokens * 128 + tokens * 2)
    assert backward["bytes_moved"] == 4 * (8 * tokens * 128 + tokens * 2)
    assert forward["shape"] == (2, 8, 128)


@pytest.mark.parametrize(
    ("op", "elements"),  # of a token, that the kernel's backward reads or writes for a layer alone
    [
        ("adaln_norm", 2 * 64),  # a gradient that comes past the branch, and y again
        ("gated_adaln_norm", 64),  # y again
        ("gated_residual", 0),
        ("gelu", 4 * 64),  # the activation again
        ("swiglu", 192),  # the same; 8 / 3 of D, rounded up
        ("qk_norm_rotary", 0),
    ],
)
def test_bytes_leave_out_what_only_a_layer_asks_for(op_case, op, elements, monkeypatch):
    kernel, shapes = op_case.CASES[f"{op}_bwd"], op_case.Shapes(64, 2)
    everything = op_case.bytes_moved(kernel, op_case.record(kernel, shapes, op_case.H100)[1])
    monkeypatch.setitem(op_case.DTYPES, "cpu", op_case.DTYPE)
    assert op_case.OpCase(op, 64, (), CPU).bytes_moved("bwd") == everything - 2 * 8 * elements * 2


def test_a_row_names_what_ran_its_op_in_its_direction(op_case, monkeypatch):
    monkeypatch.setattr(op_case.ops, "implementation", lambda device, op: f"{op} on {device}")
    case, noise = op_case.OpCase("gelu", 64, (), CPU), make_case(op_case, "noise_and_loss")
    assert case.implementation("fused", "fwd") == "gelu_fwd on cpu"
    assert case.implementation("fused", "bwd") == "gelu_bwd on cpu"
    assert case.implementation("compiled", "fwd") == "inductor"
    assert case.implementation("eager", "bwd") == "torch"
    assert noise.implementation("fused", "fwd+bwd") == "score_loss_fwd on cpu"


# the noise and the loss


def make_case(op_case, op, shape=(5, 1, 4, 4), impls=PAIR):
    return op_case.NoiseCase(op, shape, torch.float32, impls, CPU)


def test_every_implementation_has_the_noise_that_it_should(op_case):
    case = make_case(op_case, "add_noise", (4, 20_000))
    z0, sigma, _ = inputs = case.inputs()
    scale = (sigma**2 + 0.25).sqrt()[:, None]
    for (call,) in case.calls([inputs]).values():
        noise = (call() * scale - z0) / sigma[:, None]
        assert noise.std(1) == pytest.approx(torch.ones(4), abs=0.03)


def test_the_losses_of_one_noise_agree(op_case):
    case = make_case(op_case, "score_loss")
    z0, sigma, prediction = case.inputs()
    draw = op_case.draw_on(CPU)
    noise = op_case.ops.normals(draw, 5, 16).view(5, 1, 4, 4)
    z = z0 + sigma.view(-1, 1, 1, 1) * noise
    eager = op_case._eager_loss(prediction, z, z0, sigma)
    fused = op_case._loss(draw, prediction, None, z0, sigma)
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-6)


def test_before_and_after_the_network_give_its_input_and_the_predictions_gradient(op_case):
    case = make_case(op_case, "noise_and_loss")
    inputs = case.inputs()
    for (call,) in case.calls([inputs]).values():
        scaled, (gradient,) = call()
        assert scaled.shape == gradient.shape == inputs[0].shape and gradient.any()


def test_bytes_are_those_of_the_tensors_that_must_be_touched(op_case):
    tokens, modulation = 2 * 8 * 64, 2 * 64
    alike, mixed = (op_case.OpCase("gated_residual", 64, (), CPU, each) for each in (False, True))
    assert alike.bytes_moved("fwd") == 4 * (3 * tokens + modulation)
    assert mixed.bytes_moved("fwd") == (4 + 2 + 4) * tokens + 2 * modulation
    for op, passes in (("add_noise", 2), ("score_loss", 3)):
        assert make_case(op_case, op).bytes_moved("fwd+bwd") == passes * 5 * 16 * 4


# rows


def test_ops_row_has_its_op_times_and_rate(ops, rows_of):
    rows = rows_of(ops.OpCase("gelu", 64, PAIR, CPU))
    names = [(row["direction"], row["impl"]) for row in rows]
    assert names == [("fwd", "fused"), ("fwd", "eager"), ("bwd", "fused"), ("bwd", "eager")]
    for row in rows:
        assert row.keys() >= MEASURED
        assert row["achieved_gbps"] == pytest.approx(row["bytes_moved"] / row["median_ms"] / 1e6)
        assert row["shape"] == (2, 8, 64) and row["dtype"] == "float32"
        assert row["share_of_copy"] == row["achieved_gbps"] / row["same_size_copy_gbps"]


def test_every_copy_of_the_inputs_has_a_call_and_the_ceiling_too(ops, rows_of, bench, monkeypatch):
    measure, timed = bench("measure"), []
    monkeypatch.setattr(measure, "rotations", lambda device, moved_bytes: 3)
    run = measure.interleaved
    monkeypatch.setattr(
        measure, "interleaved", lambda calls, **more: timed.append(calls) or run(calls, **more)
    )
    (row, _) = rows_of(ops.OpCase("gelu", 64, ("eager",), CPU))
    assert row["launches"] == 3
    for calls in timed:
        assert {key: len(each) for key, each in calls.items()} == {"eager": 3, "copy": 3}
        assert len({call().data_ptr() for call in calls["copy"]}) == 3
    assert len({call.args[0].data_ptr() for call in timed[0]["eager"]}) == 3


def test_a_float32_stream_is_a_table_of_the_ops_that_have_one(ops):
    options = ops.Options(op=("gelu", "adaln_norm"), dim=(64,), stream=("float32",), device="cpu")
    ((case,), *_) = options.cases()
    assert (case.op, case.dtype_name) == ("adaln_norm", "bfloat16 on a float32 stream")


def test_one_function_is_compiled_for_a_case(ops, rows_of, bench, monkeypatch):
    made = []
    monkeypatch.setattr(bench("op_case"), "compiled", lambda f, settings: made.append(f) or f)
    rows_of(ops.OpCase("gelu", 64, ("compiled",), CPU))
    assert len(made) == 1


def test_a_tables_cases_share_a_width_or_a_shape(ops):
    asked = ("gelu", "score_loss", "two_stream_attention")
    options = ops.Options(op=asked, dim=(64, 128), device="cpu")
    tables = [[(case.op, case.shape) for case in cases] for cases in options.cases()]
    layers = [[(op, (2, 8, D)) for op in ("gelu", "two_stream_attention")] for D in (64, 128)]
    assert tables == [*layers, [("score_loss", (3, 1, 4, 4))]]
