"""What activations promise beside what all ops over rows do, and how (N, F) is cut for them."""

import pytest
import torch
import triton
import triton.language as tl
from accuracy import assert_as_accurate_as_eager, assert_op_is_accurate, with_grads
from implementations import each_implementation
from ops.raw_calls import assert_calls_stay_within_their_tensors, opcheck_calls
from ops.row_ops import DTYPES, ROW_OPS_BY_NAME

from dbkernels.ops import activations, gelu, gelu_exact, reference, swiglu
from dbkernels.ops.activations import BACKWARD_OPS, Share, activation_forward, column_launch
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.register import use_implementation

WIDTHS = {"gelu": 40, "gelu_exact": 40, "swiglu": 20}  # of u, where h has 40 columns
each_activation = pytest.mark.parametrize("name", WIDTHS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


implementation = each_implementation("gelu_fwd")


# a chunk has a row however wide
@pytest.mark.parametrize("rows", [0, 1, 4, 21])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@each_activation
def test_any_number_of_chunks_shares_the_rows(name, dtype, rows, monkeypatch):
    monkeypatch.setattr(activations, "CHUNK", rows * 40 // torch.get_num_threads())
    op = ROW_OPS_BY_NAME[name]
    with use_implementation("torch"):
        assert_op_is_accurate(op.fused, op.specification, op.inputs((21, 40), dtype)[0])


@each_dtype
def test_far_from_zero_an_activation_is_the_identity_or_zero(dtype, implementation):
    far = min(torch.finfo(dtype).max, 1e17)  # its square is a number, its cube is none
    h = torch.tensor([[-far, -300, -60, 0, 60, 300, far]], dtype=dtype)
    for op in (gelu, gelu_exact):
        u, dh, _ = with_grads(op, h, torch.zeros(7), upstream=lambda u: [torch.full_like(*u, 2)])
        assert torch.equal(u, h.relu()) and dh.tolist() == [[0, 0, 0, 1, 2, 2, 2]]
    a = h.clamp(-1e4, 1e4) * 2
    h = torch.cat([a, torch.full_like(a, 3)], 1)
    u, dh, _ = with_grads(swiglu, h, torch.zeros(14), upstream=lambda u: [torch.full_like(*u, 2)])
    assert torch.equal(u, 3 * a.relu()) and dh[0, :7].tolist() == [0, 0, 0, 3, 6, 6, 6]
    assert torch.equal(dh[:, 7:], 2 * a.relu())


def backward_outputs(name, h, du, bias):
    dbias = torch.empty(h.shape[1], dtype=torch.float32)
    out = {"dh": torch.empty_like(h), "u": torch.empty_like(du), "dbias": dbias}
    BACKWARD_OPS[name](h, du, bias, **out)
    return out


@each_dtype
@each_activation
def test_backward_writes_u_again(name, dtype, implementation):
    h, bias = ROW_OPS_BY_NAME[name].inputs((9, 40), dtype)[0]
    exact = getattr(reference, name)(h.double(), bias.double())
    du = torch.randn_like(h[:, : WIDTHS[name]])
    actual = backward_outputs(name, h, du, bias)["u"]
    assert_as_accurate_as_eager("u", actual, activation_forward(name, h, bias), exact)


@pytest.mark.parametrize("biased", [True, False])
@each_dtype
@each_activation
def test_backward_may_write_over_its_inputs_in_some_rows_of_a_tensor(
    name, dtype, biased, implementation, monkeypatch
):
    monkeypatch.setattr(activations, "CHUNK", 4 * 300)
    h, bias = ROW_OPS_BY_NAME[name].inputs((33, 300), dtype)[0]
    du = torch.randn_like(h[:, : 300 * WIDTHS[name] // 40])
    bias = bias if biased else None
    rows = slice(5, 26)
    expected = backward_outputs(name, h[rows], du[rows], bias)

    h_before, du_before, dbias = h.clone(), du.clone(), torch.empty(300)
    BACKWARD_OPS[name](h[rows], du[rows], bias, h[rows], du[rows], dbias)
    assert all(map(torch.equal, (h[rows], du[rows], dbias), expected.values()))
    for now, before in ((h, h_before), (du, du_before)):
        assert torch.equal(now[:5], before[:5]) and torch.equal(now[26:], before[26:])


@each_activation
def test_a_layer_asks_for_what_well_formed_ops_write_alone(name, implementation):
    h, bias = ROW_OPS_BY_NAME[name].inputs((5, 38))[0]
    for check in (opcheck_calls, assert_calls_stay_within_their_tensors):
        check(lambda: backward_outputs(name, h, torch.randn(5, WIDTHS[name] * 38 // 40), bias))


FORWARD, BACKWARD = Share(4, 64, 0), Share(2, 96, 0)


def launch(N, F, share):
    """The grid, rows of a program, and the tile."""
    grid, rows, options = column_launch(torch.empty(N, F, device="meta"), share)
    assert options["maxnreg"] == share.registers
    return grid, rows, [options[name] for name in ("BLOCK_N", "BLOCK_F", "num_warps")]


@pytest.mark.parametrize(
    ("widths", "idle"),
    [([512, 1536, 3072, 4096, 4608, 6144, 16384], 0), ([1, 255, 257, 1000, 2731, 16385], 255)],
    ids=["common widths", "any widths"],
)
def test_few_lanes_are_idle(widths, idle):
    for F in widths:
        (column_tiles, _), _, (_, BLOCK_F, _) = launch(1, F, FORWARD)
        assert 0 <= column_tiles * BLOCK_F - F <= idle, F


@pytest.mark.parametrize(
    ("F", "share", "options"),
    [(100, BACKWARD, [2, 256, 1]), (1536, BACKWARD, [2, 512, 2]), (4096, FORWARD, [4, 1024, 4])],
)
def test_each_thread_reads_16_bytes_of_bfloat16_of_each_row_at_once(F, share, options):
    assert launch(1, F, share)[2] == options


@pytest.mark.parametrize("N", [1, 7, 1000, 2**31])
@pytest.mark.parametrize("F", [40, 1536, 16384])
def test_programs_fill_the_device_in_one_wave_and_cover_the_rows_in_whole_tiles(N, F, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: 132)
    (column_tiles, splits), rows, (BLOCK_N, BLOCK_F, num_warps) = launch(N, F, BACKWARD)
    assert column_tiles * BLOCK_F >= F and splits * rows >= N
    assert rows % BLOCK_N == 0 and rows >= BLOCK_N
    fit = 132 * tile.programs_per_processor(96, num_warps)
    assert splits * column_tiles <= fit
    # the limit of a grid's second axis
    assert splits < 2**16
    if N == 2**31:
        assert splits * column_tiles >= 0.45 * fit


def test_fewer_registers_bring_more_programs(monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: 2)
    assert launch(4096, 512, Share(4, 64, 0))[1] == 128  # 16 programs of 2 warps
    assert launch(4096, 512, Share(4, 128, 0))[1] == 256


@triton.jit
def _columns_kernel(cols_ptr, rows_ptr, N, F, rows_per_program, BLOCK_F: tl.constexpr):
    cols, first, last = activations._columns(N, F, rows_per_program, BLOCK_F)
    tl.store(cols_ptr + cols, cols, mask=cols < F)
    tl.store(rows_ptr + 2 * tl.program_id(1), first)
    tl.store(rows_ptr + 2 * tl.program_id(1) + 1, last)


def test_rows_beyond_32_bits_have_their_own_number():
    cols, rows = torch.zeros(40, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64)
    N, rows_per_program = 3 * 2**30 + 5, 2**30
    with use_implementation("triton"):
        _columns_kernel[(3, 4)](cols, rows, N, 40, rows_per_program, BLOCK_F=16)
    assert cols.tolist() == list(range(40))
    assert rows.tolist() == [[i * 2**30, min((i + 1) * 2**30, N)] for i in range(4)]


def test_scratch_is_no_larger_than_the_tensor():
    ((_, scratch),) = activations.chunks(1, torch.zeros(3, 5))
    assert scratch.untyped_storage().nbytes() == 3 * 5 * 4
