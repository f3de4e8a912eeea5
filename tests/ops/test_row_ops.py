"""What ops over rows and attention promise, in every implementation: entries of `row_ops`."""

from functools import partial
from itertools import cycle, product

import pytest
import torch
from accuracy import assert_op_is_accurate
from implementations import implementations
from ops.raw_calls import assert_calls_stay_within_their_tensors, opcheck_calls
from ops.row_ops import (
    ATTENTION,
    BF16,
    DTYPES,
    F32,
    ROW_OPS,
    ROW_OPS_BY_NAME,
    TWO_STREAM,
    by_heads,
    modulated,
    outputs_of,
    projected,
    results,
)

from dbkernels.ops.backend import tile
from dbkernels.ops.backend.register import implementation, use_implementation

TOKENS = {"x", "h", "qkv", "q", "k", "v"}  # arguments with a row to a token
OF_SAMPLES = TOKENS | {"gate", "scale", "shift"}
STRIDED = {
    "zero": lambda dy: dy[:1, :1, :1].expand_as(dy),
    "transposed": lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1),
    "heads first": lambda dy: dy.transpose(1, 2).contiguous().transpose(1, 2),
    "every second": lambda dy: torch.stack([dy, -dy], -1)[..., 0],
}
RUNS = [(op, name) for op in ROW_OPS for name in implementations(f"{op.name}_fwd")]
# of what no implementation has for itself: code that is compiled, else Triton's, since plain torch
# forgives the caller what both would not
ONCE = [*{op.name: (op, name) for op, name in RUNS if name != "torch"}.values()]
STREAMS = [(TWO_STREAM, name) for name in implementations("two_stream_fwd")]
OF_HEADS = [(ATTENTION, "torch"), *STREAMS]


def run_by(request):
    with use_implementation(request.param[1]):
        yield request.param[0]


def run_id(param):
    return f"{param[0].name}-{param[1]}"


row_op = pytest.fixture(params=RUNS, ids=run_id)(run_by)
with_kernels = pytest.fixture(params=[*RUNS, *STREAMS], ids=run_id)(run_by)
op = pytest.fixture(params=[*RUNS, *OF_HEADS], ids=run_id)(run_by)
once = pytest.fixture(params=[*ONCE, OF_HEADS[0], OF_HEADS[-1]], ids=run_id)(run_by)


def interpreted():
    """Whether Triton's interpreter runs the ops, which is far slower than the others."""
    return implementation("cpu") == "triton"


def assert_accurate(op, where, args, options):
    both = (partial(f, **options) for f in (op.fused, op.specification))
    assert_op_is_accurate(*both, args, where=f"{op.name} {where}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_eager(op, dtype):
    for shape, variant in op.cases(DTYPES.index(dtype) if interpreted() else None):
        args, options = op.inputs(shape, dtype, **variant)
        assert_accurate(op, f"at {shape}, {variant}", args, options)


def assert_rounded_once(op, args, options):
    upstream = [torch.randn_like(y) for y in outputs_of(op.fused, args, **options)]
    actual = results(op.fused, args, lambda outputs: upstream, **options)
    doubles = [a.double() for a in args]
    exact = results(
        op.specification, doubles, lambda outputs: [g.double() for g in upstream], **options
    )
    assert [a.dtype for a in actual[-len(args) :]] == [a.dtype for a in args]
    names = [*("y" for _ in upstream), *op.arguments]
    for name, got, value in zip(names, actual, exact, strict=True):
        rtol, atol = (1e-5, 1e-5) if name == "bias" else op.rounding
        half = 1.01 * torch.finfo(got.dtype).eps / 2
        torch.testing.assert_close(got.double(), value, rtol=half + rtol, atol=atol)


def test_each_result_is_rounded_once_whatever_its_dtype(row_op):
    norms = [{"norm": "layer"}, {"norm": "rms"}] if row_op.stats else [{}]
    cases = zip(row_op.mixed, cycle(norms)) if interpreted() else product(row_op.mixed, norms)
    for dtypes, norm in cases:
        # of a float32 h the sum with a bias is rounded, too
        exact = row_op.make is not projected or dtypes[0] != F32
        offset = 30.0 if exact and row_op.make is not by_heads else 0.0
        variant = {"offset": 3.0, "eps": 0.1, **norm} if row_op.stats else {"offset": offset}
        args, options = row_op.inputs((2, 7, 72) if row_op.stats else None, **variant)
        args = [a.to(dtype) for a, dtype in zip(args, dtypes, strict=True)]
        if exact:
            assert_rounded_once(row_op, args, options)
        else:
            assert_accurate(row_op, f"of {dtypes}", args, options)


# a program has several tiles of several samples, a tile of the only one, or a tile that two share;
# of 23 tokens the last program of qk_norm_rotary has fewer, both ways
@pytest.mark.parametrize(
    ("processors", "shape", "dtype"),
    [(1, (9, 5), F32), (2, (1, 23), F32), (2, (2, 21), BF16), (100, (2, 9), BF16)],
)
@pytest.mark.parametrize("row_op", [(op, "triton") for op in ROW_OPS], ids=run_id, indirect=True)
def test_any_number_of_programs_shares_the_samples(row_op, processors, shape, dtype, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    # 300: two tiles of columns
    width = (300,) if row_op.make is projected and dtype == BF16 else row_op.small[2:]
    args, options = row_op.inputs((*shape, *width), dtype)
    assert_accurate(row_op, f"at {shape} on {processors} processors", args, options)


def test_same_bits_every_run_and_no_argument_is_changed(op):
    for shape in (op.small, op.shapes[-1])[: 1 if interpreted() else 2]:
        args, options = op.inputs(shape)
        before = [a.clone() for a in args]
        first, second = (results(op.fused, args, **options) for _ in range(2))
        assert all(map(torch.equal, first, second)) and all(map(torch.equal, args, before))


def test_tokens_do_not_see_each_other_and_what_is_not_finite_stays_in_its_own(row_op):
    args, options = row_op.inputs()
    count = len(outputs_of(row_op.fused, args, **options))
    # and the gradient of the first argument
    clean = [t.clone() for t in results(row_op.fused, args, **options)[: count + 1]]
    args[0][1, 4, 3], args[0][0, 7, 2] = torch.nan, torch.inf
    there = results(row_op.fused, args, **options)[: count + 1]
    for token in ((1, 4), (0, 7)):
        assert not all(t[token].isfinite().all() for t in there[:count])
        for before, after in zip(clean, there, strict=True):
            after[token] = before[token]
    assert all(map(torch.equal, there, clean))


HUGE = {  # what a token holds, by the numbers of its columns
    "past the root of the range": lambda cols: 1e20 * (1 - 2.0 * (cols % 2)),
    "near the end of the range": lambda cols: 3e38 * (1 - 2.0 * (cols % 3 == 0)),
    "one column": lambda cols: torch.where(cols == 3, 1e20, 0.5),
    "inf": lambda cols: torch.where(cols == 3, torch.inf, 0.5),
    "-inf": lambda cols: torch.where(cols == 5, -torch.inf, -0.5),
    "nan": lambda cols: torch.where(cols == 0, torch.nan, 1.0),
}


@pytest.mark.parametrize("huge", HUGE)
def test_at_any_input_a_number_is_right_or_none_in_every_implementation(row_op, huge):
    for variant in row_op.variants if row_op.make is modulated else row_op.variants[:1]:
        args, options = row_op.inputs(**variant)
        args[0][1, 4] = HUGE[huge](torch.arange(args[0].shape[-1]))
        actual = results(row_op.fused, args, **options)
        with use_implementation("torch"):
            plain = results(row_op.fused, args, **options)
        exact = results(row_op.specification, [a.double() for a in args], **options)
        for i, (value, other, right) in enumerate(zip(actual, plain, exact, strict=True)):
            assert torch.equal(value.isfinite(), other.isfinite()), f"result {i}, {variant}"
            # of a row: what it adds up from is as large as its largest
            allowed = 1e-4 * (1 + right.abs().nan_to_num(0, 0).amax(-1, keepdim=True))
            wrong = value.isfinite() & ~((value.double() - right).abs() <= allowed)
            assert not wrong.any(), f"result {i}, {variant}: {value[wrong]} for {right[wrong]}"


def test_arguments_may_have_any_strides(once):
    op, (args, options) = once, once.inputs()
    for strided in STRIDED.values():
        # modulation is in slices, and says so where it is not
        given = [
            strided(a) if name in TOKENS else a if a.dim() > 1 else a.repeat_interleave(2)[::2]
            for name, a in zip(op.arguments, args, strict=True)
        ]
        dense = [
            a if name in OF_SAMPLES - TOKENS else a.contiguous()
            for name, a in zip(op.arguments, given, strict=True)
        ]
        actual, expected = (results(op.fused, values, **options) for values in (given, dense))
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_an_incoming_gradient_may_have_any_strides(once, strided):
    op, (args, options) = once, once.inputs()
    for output in range(len(outputs_of(op.fused, args, **options))):

        def upstream(outputs, change, output=output):
            torch.manual_seed(output)
            random = [torch.randn_like(y) for y in outputs]
            random[output] = change(random[output])
            return random

        expected = results(
            op.fused, args, partial(upstream, change=lambda dy: strided(dy).clone().contiguous()),
            **options,
        )  # fmt: skip
        actual = results(op.fused, args, partial(upstream, change=strided), **options)
        assert all(map(torch.equal, actual, expected))


def test_keeps_arguments_and_at_most_two_numbers_a_token(row_op):
    args, options = row_op.inputs()
    leaves = {
        name: a.requires_grad_()
        for name, a in zip(row_op.arguments, args, strict=True)
        if row_op.kept is None or name in row_op.kept or a.requires_grad_() is None
    }
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        outputs_of(row_op.fused, args, **options)
    expected = [a.data_ptr() for a in leaves.values()]
    if options.get("rotary") is not None:
        expected.append(options["rotary"].data_ptr())
    assert {t.data_ptr() for t in kept[: len(expected)]} == set(expected)
    stats = [((2, 9, 2), F32)] if row_op.stats else []
    assert [(t.shape, t.dtype) for t in kept[len(expected) :]] == stats


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("leading", [(0, 5), (2, 0)], ids=str)
def test_an_empty_batch_has_zero_gradients(op, leading, per_token):
    variant = {"per_token": per_token} if op.make is modulated else {}
    args, options = op.inputs((*leading, *op.small[2:]), **variant)
    values = results(op.fused, args, **options)
    outputs = values[: len(values) - len(args)]
    assert all(y.shape[:2] == leading for y in outputs)
    for grad, arg in zip(values[len(outputs) :], args, strict=True):
        assert torch.equal(grad, torch.zeros_like(arg))


def test_is_made_of_well_formed_torch_ops(with_kernels):
    op = with_kernels
    for variant in op.optional:
        args, options = op.inputs((2, 3, *op.small[2:]), **variant)
        opcheck_calls(lambda args=args, options=options: results(op.fused, args, **options))


def test_touches_nothing_beside_its_tensors(with_kernels):
    op = with_kernels
    # of compiled code rows begin amid vectors, and are narrower than one, or have several pieces
    cases = product(DTYPES, (2, 8, 34, 66, 386))
    if implementation("cpu") in ("triton", "torch"):  # which address single elements
        cases = (F32, 8), (BF16, 386)
    for (dtype, width), variant in product(cases, op.optional):
        odd = width - (op.make is modulated)
        args, options = op.inputs((2, 7, *op.small[2:-1], odd), dtype, **variant)
        assert_calls_stay_within_their_tensors(partial(results, op.fused, args, **options))


def test_compiles_without_graph_breaks(once):
    op = once
    # dynamic: sizes that vary from call to call, as the last batch of an epoch does
    for dynamic in [False, True] if op.name == "adaln_norm" else [op.make is modulated]:
        per_token = [{"per_token": True}] if dynamic else []
        for variant in [*op.optional, *per_token]:
            args, options = op.inputs(**variant)
            torch.compiler.reset()
            fused = partial(op.fused, **options)
            compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=dynamic)
            actual, expected = results(compiled, args), results(fused, args)
            assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("op", [*ROW_OPS, ATTENTION, TWO_STREAM], ids=lambda op: op.name)
def test_plain_torch_agrees_with_differences_in_float64(op):
    with use_implementation("torch"), torch.device("cpu"):
        norms = [{"norm": "layer", "eps": 0.1}, {"norm": "rms", "eps": 0.1}]
        for variant in norms if op.stats else op.variants if op is ATTENTION else [{}]:
            args, options = op.inputs((2, 3, *((2, 4) if len(op.small) == 4 else (6,))), **variant)
            args = [a.double().requires_grad_() for a in args]
            assert torch.autograd.gradcheck(partial(op.fused, **options), args)


def test_refuses_a_second_derivative(op):
    args, options = op.inputs()
    args = [a.requires_grad_() for a in args]
    y = outputs_of(op.fused, args, **options)[0]
    with pytest.raises(RuntimeError, match=f"{op.name} has no second derivative"):
        torch.autograd.grad(y.sum(), args, create_graph=True)


def test_eps_is_one_millionth_of_a_unit_of_variance_or_what_is_said(row_op):
    if row_op.stats or row_op.make is by_heads:
        args, options = row_op.inputs()
        args = [1e-3 * a if name in TOKENS else a for name, a in zip(row_op.arguments, args)]  # noqa: B905
        for given, eps in (({}, 1e-6), ({"eps": 1e-4}, 1e-4)):
            specification = partial(row_op.specification, **options, eps=eps)
            assert_op_is_accurate(partial(row_op.fused, **options, **given), specification, args)


def rejected():
    """The name of an op, the argument that is wrong, what makes it so, and the error."""
    for op in ROW_OPS[:-1]:
        devices = f"{' and '.join(op.arguments)} must be on one device"
        for name in op.arguments:
            yield op.name, name, torch.Tensor.long, f"{name} must be one of float32"
            yield op.name, name, partial(torch.Tensor.to, device="meta"), devices
        if op.make is modulated:
            tokens = [name for name in op.arguments if name in TOKENS]
            slices = [name for name in op.arguments if name not in TOKENS]
            both, alike = (" and ".join(names) for names in (tokens, slices))
            yield op.name, "x", lambda x: x[0], rf"{both} must be \(B, T, D\), got .*\(9, 40\)"
            if "h" in tokens:
                yield op.name, "h", lambda h: h[:, :4], r"got \(2, 4, 40\) and \(2, 9, 40\)"
            for name in slices:
                sizes = r"\(B, D\) = \(2, 40\) or \(B, T, D\) = \(2, 9, 40\), got"
                yield op.name, name, lambda a: a[:1], f"{alike} must be {sizes}"
                yield op.name, name, lambda a: a[:, None], f"{alike} must be {sizes}"
                one = (
                    f"{alike} must be slices of one modulation tensor: equal dtypes, equal strides"
                )
                yield op.name, name, lambda a: a.repeat(1, 2)[:, ::2], one
            if len(slices) > 1:
                yield op.name, "shift", torch.Tensor.half, one
                yield op.name, "shift", torch.Tensor.clone, rf"{one}.*, 1\) and torch.* \(40, 1\)"
                yield op.name, "shift", lambda a: a[:, None].expand(-1, 9, -1), sizes
        if op.make is projected:
            width = {"gelu": "F", "gelu_exact": "F", "swiglu": "2 F"}[op.name]
            no_h = rf"h must be \(..., {width}\) with F at least 1, got"
            yield op.name, "h", lambda h: h[0, 0, 0], rf"{no_h} \(\)"
            yield op.name, "h", lambda h: h[..., :0], rf"{no_h} \(2, 9, 0\)"
            yield (
                op.name,
                "bias",
                lambda bias: bias[None],
                rf"\({width},\) = \(40,\), got \(1, 40\)",
            )
    yield "swiglu", "h", lambda h: h[..., :7], r"with F at least 1, got \(2, 9, 7\)"


@pytest.mark.parametrize(("name", "argument", "change", "message"), list(rejected()))
def test_rejects(name, argument, change, message):
    op = ROW_OPS_BY_NAME[name]
    args = dict(zip(op.arguments, op.inputs()[0], strict=True))
    with pytest.raises(ValueError, match=message):
        op.fused(*(args | {argument: change(args[argument])}).values())
