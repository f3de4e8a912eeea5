import sys

import pytest
import torch

CPU = torch.device("cpu")
MEASURED = {"median_ms", "p20_ms", "p80_ms", "peak_bytes", "resident_bytes", "rounds", "timing"}


@pytest.fixture
def ops(bench, monkeypatch):
    module = bench("ops")
    for name, size in (("B", 2), ("T", 8)):
        monkeypatch.setattr(sys.modules["kernel_cases"], name, size)
        monkeypatch.setattr(module, name, size)
    return module


def test_every_op_with_a_kernel_is_timed(ops):
    assert {(op, d) for op in ops.INPUTS for d in ops.DIRECTIONS} == {
        (case.op, case.direction) for case in ops.CASES.values() if case.timed
    }


def test_every_op_computes_what_plain_torch_does(ops):
    for op in ops.INPUTS:
        case = ops.OpCase(op, 64, ("fused", "eager"), CPU)
        calls = case.calls(case.inputs())
        for direction in ops.DIRECTIONS:
            fused, eager = (ops._as_tuple(calls[impl, direction]()) for impl in case.impls)
            torch.testing.assert_close(fused, eager, rtol=0.05, atol=0.05)


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
def test_bytes_leave_out_what_only_a_layer_asks_for(ops, op, elements):
    kernel = ops.CASES[f"{op}_bwd"]
    everything = ops.bytes_moved(kernel, ops.record(kernel, 64, ops.H100)[1])
    assert ops.OpCase(op, 64, (), CPU).hbm_bytes("bwd") == everything - 2 * 8 * elements * 2


def test_bytes_of_a_forward_are_those_of_its_kernel(ops):
    tokens, row, modulation = 2 * 8, 2 * 64, 2 * 2 * 64  # bytes of a row, and of gate (B, D)
    moved = ops.OpCase("gated_residual", 64, (), CPU).hbm_bytes("fwd")
    assert moved == 3 * tokens * row + modulation


def test_ops_row_has_its_op_times_and_rate(ops):
    options = ops.Options(op=("gelu",), D=(64,), impls=("fused", "eager"), rounds=2, device="cpu")
    rows = list(ops.rows_at(64, options, CPU))
    names = [(row["direction"], row["impl"]) for row in rows]
    assert names == [("fwd", "fused"), ("fwd", "eager"), ("bwd", "fused"), ("bwd", "eager")]
    for row in rows:
        assert row.keys() >= MEASURED | {"op", "D", "dtype", "hbm_bytes", "implementation"}
        assert row["achieved_gbps"] == pytest.approx(row["hbm_bytes"] / row["median_ms"] / 1e6)


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
