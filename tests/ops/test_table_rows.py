"""Rows of tables, small enough for the interpreter, and the gradients of the tables."""

import importlib
from functools import partial
from itertools import product

import pytest
import torch
from accuracy import assert_op_is_accurate, with_grads
from implementations import implementations, thinned
from ops.one_layer import Ops, saved_bytes
from ops.raw_calls import Scratch, assert_calls_stay_within_their_tensors, opcheck_calls
from threads import with_threads

from dbkernels.ops import reference, table_rows
from dbkernels.ops.backend.register import use_implementation

# by its name as a module, which the function of the same name hides
module = importlib.import_module("dbkernels.ops.table_rows")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of what no implementation has for itself
BY_ONE = pytest.mark.parametrize("implementation", ["torch"], indirect=True)
each_form = pytest.mark.parametrize("unit", [False, True], ids=["plain", "unit"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=implementations("table_rows_fwd"), autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(module, "RUN", 4)  # tokens: some rows then have more runs than one
    with use_implementation(request.param):
        yield request.param


def assert_same_bits(actual, expected):
    assert all(map(torch.equal, actual, expected))


def looked_up(index, *, f=table_rows, **options):
    """Of a table, as a function of it alone."""
    return partial(lambda table: f(table, index, **options))


def table_of(V, D, dtype=torch.float32):
    """Rows of lengths from 0.1 to 30, with a mean."""
    lengths = torch.logspace(-1, 1.5, V)[torch.randperm(V), None]
    return ((0.5 + torch.randn(V, D)) * lengths / D**0.5).to(dtype)


def zipf(N, V):
    return (V ** torch.rand(N)).long() - 1


def counted(*counts):
    """So many tokens of each row, in no order."""
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return index[torch.randperm(len(index))]


CASES = {  # V, D and the index
    "zipf": lambda: (27, 12, zipf(90, 27)),
    "all_equal": lambda: (5, 12, torch.full((150,), 3)),  # more runs than are added at once
    "all_distinct": lambda: (40, 12, torch.randperm(40)),
    "ends_of_runs": lambda: (9, 12, counted(4, 8, 1, 3, 2, 10, 0, 7, 5)),
    "less_than_a_run": lambda: (5, 12, torch.zeros(3).long()),
    "one_token": lambda: (5, 12, torch.tensor([4])),
    "no_dimension": lambda: (5, 12, torch.tensor(2)),
    "many_dimensions": lambda: (5, 12, torch.randint(0, 5, (2, 3, 4))),
    "one_row": lambda: (1, 12, torch.zeros(2, 9).long()),
    "one_column": lambda: (7, 1, torch.randint(0, 7, (30,))),
    "odd_width": lambda: (7, 37, torch.randint(0, 7, (30,))),
    "real_width": lambda: (3, 768, torch.randint(0, 3, (11,))),
    "wide": lambda: (2, 3200, torch.randint(0, 2, (6,))),
}


# of 13 cases every third has each of them in both forms, and each dtype
@thinned("table_rows_fwd", "dtype case unit", [*product(DTYPES, CASES, [False, True])])
def test_as_accurate_as_eager(implementation, dtype, case, unit):
    V, D, index = CASES[case]()
    table = table_of(V, D, dtype)
    calls = (looked_up(index, f=f, unit=unit) for f in (table_rows, reference.table_rows))
    assert_op_is_accurate(*calls, [table], where=case)
    rows = table_rows(table, index, unit=unit)
    assert rows.shape == (*index.shape, D) and rows.dtype == dtype
    assert unit or torch.equal(rows, table[index])


def test_many_small_parts_in_bfloat16_are_not_lost():
    # one token of 256 and many of 1/2, each half a unit in the last place of the first
    dy = torch.full((65, 1), 0.5).index_fill(0, torch.tensor(0), 256).bfloat16()
    table = torch.ones(2, 1).bfloat16().requires_grad_()
    (dtable,) = torch.autograd.grad(table_rows(table, torch.ones(65).long()), table, dy)
    assert dtable.tolist() == [[0], [288]]


@each_form
def test_a_row_that_no_index_names_has_no_part(unit):
    table, index = table_of(6, 5), torch.tensor([1, 4, 4, 3, 1, 4])
    expected = with_grads(looked_up(index, unit=unit), table)
    table[[0, 2, 5]] = torch.nan
    actual = with_grads(looked_up(index, unit=unit), table)
    assert_same_bits(actual, expected)
    assert not actual[1][[0, 2, 5]].any() and actual[1][[1, 3, 4]].all()


@each_form
def test_each_row_of_the_index_is_of_its_own(unit):
    table, index = table_of(6, 5), torch.tensor([[1, 4], [4, 3]])
    rows = table_rows(table, index, unit=unit)
    for at in product(range(2), repeat=2):
        assert torch.equal(rows[at], table_rows(table, index[at], unit=unit))


@pytest.mark.parametrize("length", [0, 1e-13, 1e-11])
def test_a_short_unit_row_is_divided_by_no_less_than_eps(length):
    table, index = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([0, 1, 0])
    table[0] *= length / 5
    calls = (looked_up(index, f=f, unit=True) for f in (table_rows, reference.table_rows))
    actual, expected = (with_grads(call, table) for call in calls)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert length or not actual[0][0].any()


def test_a_fault_in_a_row_stays_visible_in_it_alone():
    table, index = table_of(4, 5), torch.tensor([0, 2, 1, 2])
    table[2, 3] = torch.nan
    calls = (looked_up(index, f=f, unit=True) for f in (table_rows, reference.table_rows))
    for ours, theirs in zip(*(with_grads(call, table) for call in calls), strict=True):
        assert ours.isnan().any() and torch.equal(ours.isnan(), theirs.isnan())


@each_form
@pytest.mark.parametrize("leading", [(0,), (3, 0)], ids=str)
def test_without_a_token_the_gradient_is_zero(leading, unit):
    index = torch.zeros(leading).long()
    rows, dtable = with_grads(looked_up(index, unit=unit), table_of(4, 3))
    assert rows.shape == (*leading, 3) and dtable.shape == (4, 3) and not dtable.any()


@pytest.mark.parametrize(("dtype", "unit"), [(DTYPES[0], False), (DTYPES[1], True)], ids=str)
def test_same_bits_every_run_with_any_strides_and_no_argument_is_changed(dtype, unit):
    table, index = table_of(20, 12, dtype), zipf(40, 20).view(2, 20)
    before = table.clone(), index.clone()
    call = looked_up(index, unit=unit)
    expected = with_grads(call, table)
    for threads in (1, 2):
        assert_same_bits(with_threads(threads, partial(with_grads, call, table)), expected)
    assert_same_bits((table, index), before)
    spread = index.T.contiguous().T, torch.stack([index, index], -1)[..., 0]
    for other in spread:
        result = with_grads(looked_up(other, unit=unit), table.T.contiguous().T)
        assert_same_bits(result, expected)


# what autograd offers around a backward


@each_form
def test_a_frozen_table_gets_no_gradient_and_nothing_is_kept(unit):
    table, index = table_of(5, 3), torch.tensor([1, 1, 4])
    assert not table_rows(table, index, unit=unit).requires_grad
    table.requires_grad_()
    with torch.no_grad():
        assert not table_rows(table, index, unit=unit).requires_grad
    kept = saved_bytes(lambda: table_rows(table, index, unit=unit), but=[table, index])
    assert kept == 0


@each_form
def test_a_retained_graph_and_any_upstream_give_the_same_bits(unit):
    table = table_of(5, 3).requires_grad_()
    y = table_rows(table, torch.randint(0, 5, (3, 8)), unit=unit)
    for dy in (torch.randn(3, 1, 3).expand(3, 8, 3), torch.randn(3, 8, 3).mT.contiguous().mT):
        whole = dy.contiguous().clone()
        first, second = (
            torch.autograd.grad(y, table, each, retain_graph=True) for each in (dy, whole)
        )
        assert_same_bits(first, second)


@each_form
@BY_ONE
def test_plain_torch_agrees_with_differences_in_float64(unit):
    table = table_of(4, 3).double().requires_grad_()
    call = looked_up(torch.tensor([[1, 3, 1], [0, 1, 3]]), unit=unit)
    assert torch.autograd.gradcheck(call, [table])


@each_form
@BY_ONE
def test_compiles_without_graph_breaks(unit):
    table, call = table_of(5, 3), looked_up(torch.randint(0, 5, (3, 8)), unit=unit)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_same_bits(with_grads(compiled, table), with_grads(call, table))


@BY_ONE
def test_autocast_leaves_the_rows_in_the_dtype_of_the_table():
    table, call = table_of(5, 3), looked_up(torch.randint(0, 5, (8,)), unit=True)
    expected = with_grads(call, table)
    with torch.autocast(table.device.type, torch.bfloat16):
        assert_same_bits(with_grads(call, table), expected)


@BY_ONE
def test_the_whole_table_is_never_normalised():
    table, index = table_of(50, 3).requires_grad_(), torch.tensor([1, 1, 4])
    with Ops() as ops:
        table_rows(table, index, unit=True).sum().backward()
    of_whole = [name for name, shapes in ops.calls if table.shape in shapes]
    beside = {"new_empty", "detach"}  # which write nothing
    assert set(of_whole) <= {"table_rows_fwd", "table_rows_bwd", *beside}, of_whole


def test_refuses_a_second_derivative():
    table = table_of(5, 3).requires_grad_()
    total = table_rows(table, torch.tensor([1]), unit=True).sum()
    with pytest.raises(RuntimeError, match="table_rows has no second derivative"):
        torch.autograd.grad(total, table, create_graph=True)


# indices and other arguments that cannot be


@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**40)])
def test_an_index_that_is_no_row_is_an_error_on_a_cpu(wrong):
    index = torch.tensor([[0, 4, 3], [1, wrong, 2]], device="cpu")
    with pytest.raises(ValueError, match=f"index must be 0 to 4, got {wrong}$"):
        table_rows(table_of(5, 3).cpu(), index)


@each_form
@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**40)])
@pytest.mark.parametrize("implementation", ["triton", "torch"], indirect=True)
def test_an_index_that_nobody_looks_at_gives_a_row_of_nan_and_no_gradient(
    wrong, unit, implementation
):
    forward, backward = (
        getattr(module, f"_{way}_{implementation}") for way in ("forward", "backward")
    )
    table, index = table_of(5, 3), torch.tensor([0, wrong, 4, 4, *[wrong] * 9, 2])
    known = (index >= 0) & (index < 5)
    y, dtable, expected = torch.empty(len(index), 3), *torch.empty(2, 5, 3)
    forward(index, table, unit, y)
    assert torch.equal(y.isnan().all(1), ~known) and y[known].isfinite().all()
    dy = torch.randn(len(index), 3)
    for kept, out in ((known | True, dtable), (known, expected)):
        rows, tokens = index[kept].sort(stable=True)
        backward(dy[kept].contiguous(), table if unit else None, rows, tokens, out)
    torch.testing.assert_close(dtable, expected)


META = {"device": "meta"}
REJECTED = [
    ({"table": torch.ones(5)}, r"table must be \(V, D\) with .*, got \(5,\)"),
    ({"table": torch.ones(0, 3)}, r"V at least 1 and D 1 to 16384, got \(0, 3\)"),
    ({"table": torch.ones(5, 0)}, r"got \(5, 0\)"),
    ({"table": torch.ones(1, 16385)}, r"got \(1, 16385\)"),
    ({"table": torch.ones(5, 3).long()}, "table must be one of float32, .*, got torch.int64"),
    ({"index": torch.ones(2)}, "index must be int64 on .*, got torch.float32 on"),
    ({"index": torch.ones(2).int()}, "index must be int64 on .*, got torch.int32 on"),
    ({"index": torch.ones(2, **META).long()}, "index must be int64 .* on meta"),
]


@pytest.mark.parametrize(("changes", "message"), REJECTED)
def test_rejects(changes, message):
    given = {"table": table_of(5, 3), "index": torch.tensor([1, 2])}
    moved = {n: t if t.is_meta else t.to(given["table"].device) for n, t in changes.items()}
    with pytest.raises(ValueError, match=message):
        table_rows(**{**given, **moved})


# the raw ops


@each_form
@each_dtype
def test_is_a_well_formed_torch_op_that_writes_its_outputs_alone(dtype, unit):
    table, index = table_of(5, 24, dtype), zipf(11, 5)
    call = partial(with_grads, looked_up(index, unit=unit), table)
    opcheck_calls(call)
    assert_calls_stay_within_their_tensors(call)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("tokens", [1, 4, 5, 30])
def test_the_launcher_allocates_what_is_counted(tokens):
    with Scratch() as scratch:
        with_grads(looked_up(zipf(tokens, 5)), table_of(5, 3))
    assert scratch.bytes == scratch.allocated == {"table_rows_bwd": 4 * 2 * -(-tokens // 4) * 3}
