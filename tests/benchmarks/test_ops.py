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
    cases = [ops.OpCase("gelu", 64, ("fused", "eager"), CPU)]
    rows = list(ops.rows_at(cases, 2, CPU))
    names = [(row["direction"], row["impl"]) for row in rows]
    assert names == [("fwd", "fused"), ("fwd", "eager"), ("bwd", "fused"), ("bwd", "eager")]
    for row in rows:
        assert row.keys() >= MEASURED
        assert row["achieved_gbps"] == pytest.approx(row["bytes_moved"] / row["median_ms"] / 1e6)
        assert row["shape"] == (2, 8, 64) and row["dtype"] == "float32"


def test_a_tables_cases_share_a_width_or_a_shape(ops):
    options = ops.Options(op=("gelu", "score_loss", "swiglu"), D=(64, 128), device="cpu")
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
        ({"D": (96,)}, "D must be a multiple of 64, got 96"),
        ({"rounds": 1}, "rounds must be at least 2, got 1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_ops_refuses_options_in_a_sentence(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench("ops").Options(**options)
