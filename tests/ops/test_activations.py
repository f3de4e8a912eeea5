"""What activations promise beside what all ops over rows do, and how (N, F) is cut for them."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from accuracy import assert_as_accurate_as_eager, with_grads
from implementations import implementations
from ops.row_ops import DTYPES, ROW_OPS_BY_NAME, opcheck_calls, results

from dbkernels.ops import activations, gelu, reference, swiglu
from dbkernels.ops.activations import BACKWARD_OPS, Share, activation_forward, column_launch
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.register import use_implementation

WIDTHS = {"gelu": 40, "swiglu": 20}  # of u, where h has 40 columns


@pytest.fixture(params=implementations("gelu_fwd"))
def implementation(request):
    with use_implementation(request.param):
        yield request.param


@pytest.mark.parametrize("rows", [1, 4, 21])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", WIDTHS)
def test_any_number_of_chunks_shares_the_rows(name, dtype, rows, monkeypatch):
    monkeypatch.setattr(activations, "CHUNK", rows * 40 // torch.get_num_threads())
    op = ROW_OPS_BY_NAME[name]
    args, _ = op.inputs((21, 40), dtype)
    with use_implementation("torch"):
        actual, eager = results(op.fused, args), results(op.specification, args)
    exact = results(op.specification, [a.double() for a in args])
    for values in zip(actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_zero_gelu_is_the_identity_or_zero(dtype, implementation):
    far = min(torch.finfo(dtype).max, 1e17)  # its square is a number, its cube is none
    h = torch.tensor([[-far, -300, -60, 0, 60, 300, far]], dtype=dtype, requires_grad=True)
    u = gelu(h, torch.zeros(7, dtype=dtype))
    assert torch.equal(u, h.relu())
    (dh,) = torch.autograd.grad(u, h, torch.full_like(u, 2))
    assert dh.tolist() == [[0, 0, 0, 1, 2, 2, 2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_zero_swiglu_is_the_product_or_zero(dtype, implementation):
    a = torch.tensor([-1e4, -300, -120, 0, 60, 300, 1e4], dtype=dtype)
    h = torch.cat([a, torch.full_like(a, 3)])[None].requires_grad_()
    u = swiglu(h, torch.zeros(14, dtype=dtype))
    assert torch.equal(u[0], 3 * a.relu())
    (dh,) = torch.autograd.grad(u, h, torch.full_like(u, 2))
    assert dh[0, :7].tolist() == [0, 0, 0, 3, 6, 6, 6]
    assert torch.equal(dh[0, 7:], 2 * a.relu())


@pytest.mark.parametrize("half", [0, 1])
def test_a_fault_upstream_stays_visible(half, implementation):
    u, dh = with_grads(gelu, torch.tensor([[torch.nan, 1.0]]))
    assert u.isnan().tolist() == dh.isnan().tolist() == [[True, False]]
    h = torch.ones(1, 4)
    h[0, 2 * half] = torch.nan
    u, dh = with_grads(swiglu, h)
    assert u.isnan().tolist() == [[True, False]]
    # db does not depend on b
    assert dh.isnan().tolist() == [[True, False, not half, False]]


def test_the_first_half_is_the_one_in_silu(implementation):
    a, b = torch.randn(2, 5, 8)
    u = swiglu(torch.cat([a, b], dim=1))
    torch.testing.assert_close(u, a / (1 + torch.exp(-a)) * b)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_frozen_bias_changes_no_other_gradient(name, implementation):
    op = ROW_OPS_BY_NAME[name]
    h, bias = op.inputs()[0]
    dh = with_grads(op.fused, h, bias)[1]
    assert torch.equal(with_grads(partial(op.fused, bias=bias), h)[1], dh)


def backward_outputs(name, h, du, bias):
    dbias = torch.empty(h.shape[1], dtype=torch.float32)
    out = {"dh": torch.empty_like(h), "u": torch.empty_like(du), "dbias": dbias}
    BACKWARD_OPS[name](h, du, bias, **out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WIDTHS)
def test_backward_writes_u_again(name, dtype, implementation):
    h, bias = ROW_OPS_BY_NAME[name].inputs((9, 40), dtype)[0]
    exact = getattr(reference, name)(h.double(), bias.double())
    du = torch.randn_like(h[:, : WIDTHS[name]])
    actual = backward_outputs(name, h, du, bias)["u"]
    assert_as_accurate_as_eager("u", actual, activation_forward(name, h, bias), exact)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WIDTHS)
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


@pytest.mark.parametrize("name", WIDTHS)
def test_is_made_of_well_formed_torch_ops_with_what_a_layer_asks_for(name, implementation):
    h, bias = ROW_OPS_BY_NAME[name].inputs((5, 40))[0]
    opcheck_calls(lambda: backward_outputs(name, h, torch.randn(5, WIDTHS[name]), bias))


FORWARD, BACKWARD = Share(4, 64, 0), Share(2, 96, 0)


def launch(N, F, share):
    """The grid, rows of a program, and the tile."""
    grid, rows, options = column_launch(torch.empty(N, F, device="meta"), share)
    assert options["maxnreg"] == share.registers
    return grid, rows, [options[name] for name in ("BLOCK_N", "BLOCK_F", "num_warps")]


@pytest.mark.parametrize("F", [512, 4 * 384, 4 * 768, 4 * 1024, 4 * 1152, 6144, 16384])
def test_no_lane_of_a_common_width_is_idle(F):
    (column_tiles, _), _, (_, BLOCK_F, _) = launch(1, F, FORWARD)
    assert column_tiles * BLOCK_F == F


@pytest.mark.parametrize("F", [1, 255, 257, 1000, 2731, 16385])
def test_fewer_than_256_lanes_of_any_width_are_idle(F):
    (column_tiles, _), _, (_, BLOCK_F, _) = launch(1, F, FORWARD)
    assert 0 <= column_tiles * BLOCK_F - F < 256


def test_each_thread_reads_16_bytes_of_bfloat16_of_each_row_at_once():
    assert launch(1, 100, BACKWARD)[2] == [2, 256, 1]
    assert launch(1, 1536, BACKWARD)[2] == [2, 512, 2]
    assert launch(1, 4096, FORWARD)[2] == [4, 1024, 4]


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


def test_chunks_cover_the_rows_once(monkeypatch):
    monkeypatch.setattr(activations, "CHUNK", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    h, du = torch.arange(33.0).view(11, 3), torch.arange(11.0).view(11, 1).bfloat16()
    parts = list(activations.chunks(2, h.bfloat16(), du, None))
    assert [part[0].shape for part in parts] == [(5, 3), (5, 3), (1, 3)]
    assert torch.equal(torch.cat([part[1] for part in parts]), du)
    for h_rows, _, none, *scratch in parts:
        assert none is None and len(scratch) == 2
        assert all(s.shape == h_rows.shape and s.dtype == torch.float32 for s in scratch)


def test_a_chunk_has_a_row_however_wide(monkeypatch):
    monkeypatch.setattr(activations, "CHUNK", 1)
    assert len(list(activations.chunks(1, torch.zeros(3, 5)))) == 3


def test_scratch_is_no_larger_than_the_tensor():
    ((_, scratch),) = activations.chunks(1, torch.zeros(3, 5))
    assert scratch.untyped_storage().nbytes() == 3 * 5 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bias_is_added_in_float32_to_a_copy(dtype):
    h, bias, x = (
        torch.tensor([[1.0, 2.0]]).to(dtype),
        torch.tensor([2.0**-12, 0]),
        torch.empty(1, 2),
    )
    activations._add_bias(h, bias, x)
    assert x.tolist() == [[1 + 2.0**-12, 2]]
    activations._add_bias(h, bias.to(dtype), x)
    assert x.tolist() == [[1 + 2.0**-12, 2]]
    activations._add_bias(h, None, x)
    assert x.tolist() == [[1, 2]] and x.data_ptr() != h.data_ptr()


def test_a_result_is_its_own_scratch_where_it_is_exact():
    out, scratch = torch.empty(1), torch.empty(1)
    assert activations.same_dtype(out, scratch) is out
    assert activations.same_dtype(out.bfloat16(), scratch) is scratch
