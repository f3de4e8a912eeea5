import sys

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def op_case(bench, monkeypatch):
    module = bench("op_case")
    for name, size in (("B", 2), ("T", 8)):
        monkeypatch.setattr(sys.modules["kernel_cases"], name, size)
        monkeypatch.setattr(module, name, size)
    return module


def test_every_op_with_a_kernel_is_timed(op_case):
    assert {(op, d) for op in op_case.INPUTS for d in ("fwd", "bwd")} == {
        (case.op, case.direction) for case in op_case.CASES.values() if case.timed
    }


def test_every_op_computes_what_plain_torch_does(op_case):
    for op in op_case.INPUTS:
        case = op_case.OpCase(op, 64, ("fused", "eager"), CPU)
        calls = case.calls([case.inputs()])
        for direction in ("fwd", "bwd"):
            fused, eager = (op_case._as_tuple(calls[impl, direction][0]()) for impl in case.impls)
            torch.testing.assert_close(fused, eager, rtol=0.05, atol=0.05)


def test_beside_a_float32_stream_branches_are_bfloat16(op_case):
    bf16, f32 = torch.bfloat16, torch.float32
    dtypes = {
        "adaln_norm": ([f32, bf16, bf16], [bf16]),
        "gated_adaln_norm": ([f32, *[bf16] * 4], [f32, bf16]),
        "gated_residual": ([f32, bf16, bf16], [f32]),
    }
    assert dtypes.keys() == set(op_case.STREAM)
    for op, (inputs, outputs) in dtypes.items():
        case = op_case.OpCase(op, 64, ("fused", "eager"), CPU, mixed=True)
        calls = case.calls([case.inputs()])
        fused, eager = (op_case._as_tuple(calls[impl, "fwd"][0]()) for impl in case.impls)
        assert [t.dtype for t in case.inputs()] == inputs
        assert [t.dtype for t in fused] == [t.dtype for t in eager] == outputs
        torch.testing.assert_close(fused, eager, rtol=0.05, atol=0.05)
        grads = calls["fused", "bwd"][0]()
        assert [t.dtype for t in grads] == inputs


def test_a_float32_stream_moves_twice_its_bytes(op_case):
    tokens, modulation = 2 * 8 * 64, 2 * 64
    case = op_case.OpCase("gated_residual", 64, (), CPU, mixed=True)
    assert case.bytes_moved("fwd") == (4 + 2 + 4) * tokens + 2 * modulation


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


def test_bytes_of_a_forward_are_those_of_its_kernel(op_case):
    tokens, row, modulation = 2 * 8, 4 * 64, 4 * 2 * 64  # bytes of a row, and of gate (B, D)
    moved = op_case.OpCase("gated_residual", 64, (), CPU).bytes_moved("fwd")
    assert moved == 3 * tokens * row + modulation


def test_a_row_names_what_ran_its_op_in_its_direction(op_case, monkeypatch):
    def implementation(device, op):
        return "cpp" if op == "gelu_bwd" else "torch"

    monkeypatch.setattr(op_case.ops, "implementation", implementation)
    case = op_case.OpCase("gelu", 64, (), CPU)
    assert [case.implementation("fused", direction) for direction in ("fwd", "bwd")] == [
        "torch",
        "cpp",
    ]
    assert case.implementation("compiled", "fwd") == "inductor"
    assert case.implementation("eager", "bwd") == "torch"
