"""What a norm or a gate alone promises, and how a layer has them write into its own tensors."""

from functools import partial
from itertools import product

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, assert_op_is_accurate, with_grads
from implementations import each_implementation, thinned
from ops.raw_calls import assert_calls_stay_within_their_tensors, opcheck_calls
from ops.row_ops import BF16, DTYPES, F16, F32, MIXED, ROW_OPS_BY_NAME

from dbkernels import ops
from dbkernels.ops import adaln_norm, reference
from dbkernels.ops.adaln_norm import fold_affine
from dbkernels.ops.backend import tile

NORMS = ["adaln_norm", "gated_adaln_norm"]
GATES = ["gated_residual", "gated_adaln_norm"]
ALL = [*NORMS, "gated_residual"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# of all but x, and of x
STREAMS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
NORM_NAMES = ("layer", "rms")
each_norm = pytest.mark.parametrize("norm", NORM_NAMES)
of_norms = partial(thinned, "adaln_norm_fwd")
by_norm = of_norms("dtype norm", [*product(DTYPES, NORM_NAMES)])
by_stream = of_norms("dtype x_dtype", STREAMS)


implementation = each_implementation("adaln_norm_fwd", autouse=True)


def inputs(name, shape=(2, 7, 65), dtype=F32, offset=3.0):
    return ROW_OPS_BY_NAME[name].inputs(shape, dtype, offset=offset)[0]


@of_norms("mixed dtype", [*product(MIXED, (F32, BF16))])
def test_the_result_of_a_norm_has_the_dtype_that_is_asked_for(mixed, dtype):
    x, *modulation = inputs("adaln_norm", (2, 7, 72))
    args = [x.to(mixed[0]), *(m.to(mixed[2]) for m in modulation)]
    fused = partial(adaln_norm, dtype=dtype)
    assert fused(*args).dtype == dtype
    assert_op_is_accurate(
        fused, lambda *a: reference.adaln_norm(*a).to(dtype), args, exact=reference.adaln_norm
    )


@pytest.mark.parametrize(
    ("name", "option"),
    [*((name, {"norm": "group"}) for name in NORMS), ("adaln_norm", {"dtype": torch.bool})],
    ids=str,
)
def test_rejects_an_option(name, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be .*, got .*(group|bool)"):
        getattr(ops, name)(*inputs(name), **option)


@by_norm
@pytest.mark.parametrize("name", GATES)
def test_a_closed_gate_leaves_what_there_is_without_a_branch_and_can_open(name, dtype, norm):
    args = x, _, gate, *modulation = inputs(name, dtype=dtype)
    gate.zero_()
    if not modulation:
        y, _, dh, dgate = with_grads(ops.gated_residual, *args)
        assert torch.equal(y, x)
    else:
        assert torch.equal(ops.gated_adaln_norm(*args)[0], x)
        y, dx, dh, dgate, *rest = with_grads(
            lambda *args: ops.gated_adaln_norm(*args, norm=norm)[1], *args
        )
        alone = with_grads(partial(adaln_norm, norm=norm), x, *modulation)
        assert all(map(torch.equal, (y, dx, *rest), alone))
    assert not dh.any() and dgate.all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("output", [0, 1])
def test_a_gradient_of_the_stream_or_of_y_may_arrive_alone(output, dtype):
    args = inputs("gated_adaln_norm", (2, 7, 48), dtype)

    def output_of(f):
        return lambda *args: f(*args)[output] + 0 * args[3].sum() + 0 * args[4].sum()

    assert_op_is_accurate(*map(output_of, (ops.gated_adaln_norm, reference.gated_adaln_norm)), args)


class Buffers:
    """What forward leaves for backward, and the raw ops with a caller's tensors."""

    def __init__(self, name, dtype=F32, *, x_dtype=None, norm="layer", T=7):
        self.name, args = name, inputs(name, (2, T, 65), dtype)
        self.args = args = [args[0].to(x_dtype or dtype), *args[1:]]
        self.x, self.centred = args[0], norm == "layer"
        self.branch = args[1:2] if "h" in ROW_OPS_BY_NAME[name].arguments else []
        self.modulation = args[1 + len(self.branch) :]
        self.stats, self.x1 = torch.empty(2, T, 2), torch.empty_like(self.x)
        self.y = self.forward(self.x1) if name in NORMS else None
        self.dy = torch.randn_like(self.x if self.y is None else self.y)
        self.dres = torch.randn_like(self.x)

    def op(self, direction):
        return getattr(torch.ops.dbkernels, f"{self.name}_{direction}")

    def forward(self, x1=None):
        """y of a norm; x1 is where a gated one leaves the stream."""
        y = torch.empty_like(self.x, dtype=self.modulation[0].dtype)
        stream = [x1] if self.branch else []
        self.op("fwd")(*self.args, *stream, y, self.stats, 1e-6, self.centred)
        return y

    def backward(self, *, dres=None, dh=None, y=None, sums=None):
        """Every result that the op has, in one order."""
        sums = [torch.empty_like(m) for m in self.modulation] if sums is None else sums
        dbranch = [torch.empty_like(h) if dh is None else dh for h in self.branch]
        if self.name == "gated_residual":
            self.op("bwd")(self.dy, *self.args[1:], *dbranch, *sums)
            return [*dbranch, *sums]
        dx = torch.empty_like(self.x)
        self.op("bwd")(
            self.dy, dres, *self.args, self.stats, dx, *dbranch, y, *sums, self.centred
        )  # fmt: skip
        return [t for t in (dx, *dbranch, y, *sums) if t is not None]


@each_dtype
def test_forward_need_not_write_the_stream(dtype):
    b = Buffers("gated_adaln_norm", dtype)
    stats = b.stats.clone()
    assert torch.equal(b.forward(), b.y) and torch.equal(b.stats, stats)
    assert torch.equal(b.x1, ops.gated_adaln_norm(*b.args)[0])


@by_norm
@pytest.mark.parametrize("name", NORMS)
def test_backward_adds_the_gradient_that_went_around(name, dtype, norm):
    b = Buffers(name, dtype, norm=norm)
    without = b.backward(y=torch.empty_like(b.y))
    around = b.backward(dres=0 * b.dres, y=torch.empty_like(b.y))
    assert all(map(torch.equal, without, around))
    if dtype == F32:
        # compiled code rounds once where a product is added
        dx, expected = b.backward(dres=b.dres)[0], without[0] + b.dres
        torch.testing.assert_close(dx, expected, rtol=2**-23, atol=2**-23)


@of_norms("stream norm", [*product(STREAMS, NORM_NAMES)])
@pytest.mark.parametrize("name", NORMS)
def test_backward_writes_y_again(name, stream, norm, implementation):
    dtype, x_dtype = stream
    b = Buffers(name, dtype, norm=norm, x_dtype=x_dtype)
    again = torch.empty_like(b.y)
    b.backward(dres=b.dres, y=again)
    if implementation != "torch" and b.branch:
        assert torch.equal(again, b.y)
    exact = getattr(reference, name)(*(a.double() for a in b.args), norm=norm)
    assert_as_accurate_as_eager("y", again, b.y, exact[1] if b.branch else exact)


@by_stream
@pytest.mark.parametrize("name", ALL)
def test_backward_may_write_over_h_and_over_its_gradient(name, dtype, x_dtype):
    b = Buffers(name, dtype, x_dtype=x_dtype)
    before = [t.clone() for t in (b.dres, b.x, *b.modulation)]
    again = None if b.y is None else torch.empty_like(b.y)
    expected = b.backward(dres=b.dres, y=again)
    dy, h = b.dy.clone(), b.branch[0] if b.branch else None
    actual = b.backward(dres=b.dres, dh=h, y=None if b.y is None else b.dy)
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, (b.dres, b.x, *b.modulation), before))
    assert b.y is not None or torch.equal(b.dy, dy)


@by_stream
def test_a_gated_branch_may_be_written_over_the_stream(dtype, x_dtype):
    b = Buffers("gated_residual", dtype, x_dtype=x_dtype)
    expected = ops.gated_residual(*b.args)
    b.op("fwd")(*b.args, b.x)
    assert torch.equal(b.x, expected)


# 4 tokens are a tile: no program ends within a sample
@pytest.mark.parametrize(("processors", "T"), [(1, 7), (100, 7), (100, 4)])
@pytest.mark.parametrize("name", ALL)
def test_backward_writes_its_sums_into_slices(name, processors, T, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    b = Buffers(name, T=T)
    count, whole = len(b.modulation), torch.zeros(2, 6 * 65)
    slices = whole.chunk(6, dim=1)[2 : 2 + count]
    expected = b.backward()[-count:]
    assert all(map(torch.equal, b.backward(sums=slices)[-count:], expected))
    assert not whole[:, : 2 * 65].any() and not whole[:, (2 + count) * 65 :].any()


@pytest.mark.parametrize("name", NORMS)
def test_a_layer_asks_for_what_well_formed_ops_write_alone(name):
    b = Buffers(name, T=3)
    for call in (b.forward, lambda: b.backward(dres=b.dres, y=torch.empty_like(b.y))):
        opcheck_calls(call)
        assert_calls_stay_within_their_tensors(call)


# a norm's own weight and bias, which are folded into the modulation


def affine_inputs(*shape):
    """scale, shift, weight and bias, the last two far from what changes nothing."""
    (scale, shift), (weight, bias) = torch.randn(2, *shape), torch.randn(2, shape[-1])
    return scale, shift, 3 + weight, bias - 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_given", [True, False])
@pytest.mark.parametrize("shape", [(2, 40), (2, 5, 40)], ids=str)
@each_norm
@pytest.mark.parametrize("implementation", ["torch"], indirect=True)
def test_a_folded_weight_and_bias_do_their_work(shape, bias_given, norm, dtype):
    x = 3 + torch.randn(2, 5, 40)
    scale, shift, weight, *bias = affine_inputs(*shape)[: 3 + bias_given]
    args = scale.to(dtype), shift.to(dtype), weight, *bias
    before = [a.clone() for a in args]
    folded = fold_affine(*args)
    assert [f.dtype for f in folded] == [F32, F32] and all(map(torch.equal, args, before))

    def affine(scale, shift, weight, bias=0):
        wide = scale.to(torch.promote_types(scale.dtype, F32))
        y = weight * reference.normalise(x.to(wide), norm, 1e-6) + bias
        return (1 + reference.over_tokens(wide)) * y + reference.over_tokens(shift)

    def fused(*args):
        return adaln_norm(x, *fold_affine(*args), norm=norm)

    assert_op_is_accurate(fused, affine, args, floor=1e-5)
    # as exact where the modulation is rounded
    exact = fold_affine(*(a.double() for a in args))
    torch.testing.assert_close(folded, exact, check_dtype=False, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (1, lambda a: a[:1], r"shift must be of the shape of scale = \(2, 40\), got \(1, 40\)"),
        (2, lambda a: a[:1], r"weight must be \(D,\) = \(40,\), got \(1,\)"),
        (3, lambda a: a[None], r"bias must be \(D,\) = \(40,\), got \(1, 40\)"),
    ],
)
def test_rejects_what_it_cannot_fold(at, change, message):
    args = [*affine_inputs(2, 40)]
    args[at] = change(args[at])
    with pytest.raises(ValueError, match=message):
        fold_affine(*args)
