import json
import sys

import pytest
import torch

CPU = torch.device("cpu")
MEASURED = {"op", "impl", "implementation", "shape", "dtype", "direction", "median_ms", "p20_ms"}
MEASURED |= {"p80_ms", "bytes_moved", "allocated_bytes", "resident_bytes", "rounds", "timing"}


@pytest.fixture
def ops(bench, monkeypatch):
    module = bench("ops")
    for name in ("kernel_cases", "op_case"):
        for size, value in (("B", 2), ("T", 8)):
            monkeypatch.setattr(sys.modules[name], size, value)
    monkeypatch.setattr(module, "SHAPES", ((3, 1, 4, 4),))
    return module


def test_ops_row_has_its_op_times_and_rate(ops):
    rows = list(ops.rows_of(ops.OpCase("gelu", 64, ("fused", "eager"), CPU), 2))
    names = [(row["direction"], row["impl"]) for row in rows]
    assert names == [("fwd", "fused"), ("fwd", "eager"), ("bwd", "fused"), ("bwd", "eager")]
    for row in rows:
        assert row.keys() >= MEASURED
        assert row["achieved_gbps"] == pytest.approx(row["bytes_moved"] / row["median_ms"] / 1e6)
        assert row["shape"] == (2, 8, 64) and row["dtype"] == "float32"
        assert row["share_of_copy"] == row["achieved_gbps"] / row["same_size_copy_gbps"]


def test_every_copy_of_the_inputs_has_a_call_and_the_ceiling_too(ops, bench, monkeypatch):
    measure, timed = bench("measure"), []
    monkeypatch.setattr(measure, "rotations", lambda device, moved_bytes: 3)
    interleaved = measure.interleaved

    def seen(calls, **more):
        timed.append(calls)
        return interleaved(calls, **more)

    monkeypatch.setattr(measure, "interleaved", seen)
    (row, _) = ops.rows_of(ops.OpCase("gelu", 64, ("eager",), CPU), 2)
    assert row["launches"] == 3
    for calls in timed:
        assert {key: len(each) for key, each in calls.items()} == {"eager": 3, "copy": 3}
        assert len({call().data_ptr() for call in calls["copy"]}) == 3
    forward = timed[0]["eager"]
    assert len({call.args[0].data_ptr() for call in forward}) == 3


def test_a_float32_stream_is_a_table_of_the_ops_that_have_one(ops):
    options = ops.Options(op=("gelu", "adaln_norm"), dim=(64,), stream=("float32",), device="cpu")
    ((case,), *_) = options.tables(CPU)
    assert (case.op, case.dtype_name) == ("adaln_norm", "bfloat16 on a float32 stream")


def test_one_function_is_compiled_for_a_case(ops, bench, monkeypatch):
    made = []
    monkeypatch.setattr(bench("op_case"), "compiled", lambda f, settings: made.append(f) or f)
    list(ops.rows_of(ops.OpCase("gelu", 64, ("compiled",), CPU), 2))
    assert len(made) == 1


def test_a_tables_cases_share_a_width_or_a_shape(ops):
    options = ops.Options(op=("gelu", "score_loss", "swiglu"), dim=(64, 128), device="cpu")
    tables = [[(case.op, case.shape) for case in cases] for cases in options.tables(CPU)]
    assert tables == [
        [("gelu", (2, 8, 64)), ("swiglu", (2, 8, 64))],
        [("gelu", (2, 8, 128)), ("swiglu", (2, 8, 128))],
        [("score_loss", (3, 1, 4, 4))],
    ]


def test_the_table_of_the_noise_can_be_read(ops, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py", "--op", "noise_and_loss"])
    options = ops.Options(op=("noise_and_loss",), impls=("fused", "eager"), rounds=2, device="cpu")
    ops.main(options)
    shown = capsys.readouterr().out
    assert "3 x 1 x 4 x 4, float32" in shown and "noise_and_loss fwd+bwd" in shown
    assert "printed by python benchmarks/ops.py --op noise_and_loss" in " ".join(shown.split())


def test_a_row_says_where_it_ran_and_by_which_command(ops, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py", "--json", "--impls", "eager"])
    ops.main(ops.Options(op=("gelu",), impls=("eager",), rounds=2, device="cpu", json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["command"] for row in rows} == {"python benchmarks/ops.py --impls eager"}
    assert all(row["torch"] == torch.__version__ and row["device"] for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": ("norm",)}, "op must be one of adaln_norm, .*, got norm"),
        ({"dim": (96,)}, "dim must be a multiple of 64, got 96"),
        ({"rounds": 1}, "rounds must be at least 2, got 1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_ops_refuses_options_in_a_sentence(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench("ops").Options(**options)
