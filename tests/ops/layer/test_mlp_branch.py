import pytest
import torch
from ops.one_layer import OneLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.memory.measure import measure_peak
from dbkernels.ops import reference
from dbkernels.ops.activations import ACTIVATIONS
from dbkernels.ops.backend.register import dry_run_on_gpu
from dbkernels.ops.layer import branches as module
from dbkernels.ops.layer.branches import CHUNK, mlp_backward
from dbkernels.ops.layer.branches import mlp as mlp_forward
from dbkernels.ops.layer.projection import Gradients

B, T, D = 2, 5, 24
F64, BF16 = torch.float64, torch.bfloat16
MLP_WEIGHTS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def branch(mlp, *, bias=True, dtype=F64):
    """Weights, y and the gradient of the branch's output."""
    layer = OneLayer(B, T, D, mlp=mlp, bias=bias, dtypes=(dtype,) * 3)
    return layer.weights, torch.randn(B, T, D, dtype=F64).to(dtype), 1 + layer.tensors["x"]


def forward(y, mlp, w):
    hidden = y.new_empty(B * T, len(w.fc1_weight))
    return mlp_forward(y.clone(), mlp, w, hidden=hidden), hidden


def backward(dm, mlp, w, *, y=None, hidden=None, wanted=MLP_WEIGHTS):
    gradients = Gradients(frozenset(wanted), w.fc1_weight.dtype)
    dhidden = None if hidden is None else torch.empty_like(hidden)
    dy = mlp_backward(dm.clone(), y, hidden, mlp, w, dhidden=dhidden, gradients=gradients)
    return dy, dhidden, gradients.sums


def exact(y, dm, mlp, w):
    """m, dy and the weights' gradients, by autograd."""
    leaves = {"y": y, **{name: getattr(w, name) for name in MLP_WEIGHTS}}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items() if t is not None}
    h = leaves["y"] @ leaves["fc1_weight"].T
    u = {"gelu": reference.gelu, "swiglu": reference.swiglu}[mlp](h, leaves.get("fc1_bias"))
    m = u @ leaves["fc2_weight"].T + leaves.get("fc2_bias", 0)
    grads = torch.autograd.grad(m, list(leaves.values()), dm)
    return m.detach(), dict(zip(leaves, grads, strict=True))


# the first leaves a ragged last chunk of one token, the second none, the third is one chunk
@pytest.mark.parametrize("size", [3, 5, 8192])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mlp", list(ACTIVATIONS))
def test_agrees_with_autograd_in_chunks_of_any_size(mlp, bias, kept, size, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", size)
    w, y, dm = branch(mlp, bias=bias)
    m, hidden = forward(y, mlp, w)
    wanted = [name for name in MLP_WEIGHTS if getattr(w, name) is not None]
    expected, grads = exact(y, dm, mlp, w)
    torch.testing.assert_close(m, expected)
    torch.testing.assert_close(mlp_forward(y.clone(), mlp, w, hidden=None), expected)
    torch.testing.assert_close(hidden, y.view(-1, D) @ w.fc1_weight.T)

    dy, dhidden, sums = backward(
        dm, mlp, w, y=None if kept else y, hidden=hidden if kept else None, wanted=wanted
    )
    torch.testing.assert_close(dy, grads.pop("y"))
    if kept:
        # left to the caller, who has y later
        torch.testing.assert_close(dhidden.T @ y.view(-1, D), grads.pop("fc1_weight"))
    assert sums.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(sums[name], grad)


@pytest.mark.parametrize("mlp", list(ACTIVATIONS))
def test_the_gradient_of_hidden_may_be_written_over_it(mlp):
    w, y, dm = branch(mlp)
    _, hidden = forward(y, mlp, w)
    dy, dhidden, sums = backward(dm, mlp, w, hidden=hidden)
    gradients = Gradients(frozenset(MLP_WEIGHTS), F64)
    again = mlp_backward(dm.clone(), None, hidden, mlp, w, dhidden=hidden, gradients=gradients)
    assert torch.equal(again, dy) and torch.equal(hidden, dhidden)
    for name, grad in sums.items():
        assert torch.equal(gradients.sums[name], grad)


@pytest.mark.parametrize("wanted", [(), *[(name,) for name in MLP_WEIGHTS]], ids=str)
def test_only_what_is_wanted_is_summed(wanted):
    w, y, dm = branch("gelu")
    _, _, every = backward(dm, "gelu", w, y=y)
    _, _, sums = backward(dm, "gelu", w, y=y, wanted=wanted)
    assert sums.keys() == set(wanted)
    for name in wanted:
        assert torch.equal(sums[name], every[name])


@pytest.mark.parametrize("mlp", list(ACTIVATIONS))
def test_chunks_add_up_in_float32(mlp, monkeypatch):
    w, y, dm = branch(mlp, dtype=BF16)
    double = type(w)(*(t if t is None else t.double() for t in w))
    _, grads = exact(y.double(), dm.double(), mlp, double)
    _, _, whole = backward(dm, mlp, w, y=y)
    monkeypatch.setattr(module, "CHUNK", 1)
    _, _, parts = backward(dm, mlp, w, y=y)
    for name in ("fc1_weight", "fc1_bias", "fc2_weight"):
        assert parts[name].dtype == torch.float32
        error = (parts[name].double() - grads[name]).abs().max()
        assert error <= 2 * (whole[name].double() - grads[name]).abs().max(), name


def test_the_bias_has_a_gradient_of_float32_from_the_first_chunk_on():
    w, y, dm = branch("gelu", dtype=BF16)
    _, _, sums = backward(dm, "gelu", w, y=y)
    assert sums["fc1_bias"].dtype == torch.float32 and sums["fc1_weight"].dtype == BF16


def test_what_the_backward_reads_is_left_alone():
    w, y, dm = branch("gelu")
    _, hidden = forward(y, "gelu", w)
    before = [t.clone() for t in (y, hidden)]
    backward(dm, "gelu", w, y=y)
    backward(dm, "gelu", w, hidden=hidden)
    assert all(map(torch.equal, before, (y, hidden)))


def test_results_take_the_place_of_what_came_in():
    w, y, dm = branch("gelu")
    _, hidden = forward(y, "gelu", w)
    gradients = Gradients(frozenset(), F64)
    dy = mlp_backward(dm, None, hidden, "gelu", w, dhidden=hidden, gradients=gradients)
    assert dy is dm and mlp_forward(y, "gelu", w, hidden=None) is y


class FirstHalf(TorchDispatchMode):
    """Tokens of each op that gives an activation in the forward, by name of op."""

    def __init__(self):
        super().__init__()
        self.tokens = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in ("gelu_fwd", "swiglu_fwd"):
            self.tokens.append((name, len(args[0])))
        if name == "_addmm_activation":
            assert kwargs["use_gelu"]
            self.tokens.append((name, len(args[1])))
        return func(*args, **(kwargs or {}))


def activations_of_a_gpu(tokens, *, kept, mlp="gelu", bias=True, dtype=BF16):
    w = branch(mlp, bias=bias, dtype=dtype)[0]
    with FakeTensorMode(allow_non_fake_inputs=True), dry_run_on_gpu(132), FirstHalf() as seen:
        hidden = torch.empty(tokens, len(w.fc1_weight), dtype=dtype) if kept else None
        mlp_forward(torch.empty(1, tokens, D, dtype=dtype), mlp, w, hidden=hidden)
    return seen.tokens


@pytest.mark.parametrize(
    ("tokens", "kept", "bias", "sizes"),
    [
        (2 * CHUNK, True, True, [2 * CHUNK]),
        (2 * CHUNK + 2, True, True, [2 * CHUNK, 2]),
        (8 * CHUNK, True, True, [4 * CHUNK] * 2),
        (8 * CHUNK, False, True, [4 * CHUNK] * 2),
        # the pre-activation, which is not kept, and the activation
        (2 * CHUNK, False, False, [CHUNK] * 2),
        (8 * CHUNK, False, False, [2 * CHUNK] * 4),
    ],
)
def test_a_gpu_takes_as_many_tokens_at_once_as_leave_the_peak_where_it_is(
    tokens, kept, bias, sizes
):
    seen = activations_of_a_gpu(tokens, kept=kept, bias=bias)
    assert [size for _, size in seen] == sizes


@pytest.mark.parametrize(
    ("options", "op"),
    [
        ({"kept": False}, "_addmm_activation"),
        ({"kept": True}, "gelu_fwd"),
        ({"kept": False, "bias": False}, "gelu_fwd"),
        ({"kept": False, "mlp": "swiglu"}, "swiglu_fwd"),
        ({"kept": False, "dtype": torch.float16}, "gelu_fwd"),
        ({"kept": False, "dtype": torch.float32}, "gelu_fwd"),
    ],
)
def test_a_gpu_s_matmul_takes_gelu_itself_where_nobody_keeps_what_it_is_taken_of(options, op):
    assert activations_of_a_gpu(4, **options) == [(op, 4)]


def test_a_cpu_s_matmul_does_not_take_gelu():
    w, y, _ = branch("gelu", dtype=BF16)
    with FirstHalf() as seen:
        mlp_forward(y, "gelu", w, hidden=None)
    assert seen.tokens == [("gelu_fwd", B * T)]


@pytest.mark.parametrize("mlp", list(ACTIVATIONS))
def test_the_temporaries_of_a_chunk_die_before_the_next_has_its_own(mlp, monkeypatch):
    def peak(chunks):
        w, y, _ = branch(mlp)
        y = y.repeat(1, chunks, 1)
        monkeypatch.setattr(module, "CHUNK", B * T)

        def step():
            mlp_forward(y, mlp, w, hidden=None)
            gradients = Gradients(frozenset(), F64)
            mlp_backward(y, y, None, mlp, w, dhidden=None, gradients=gradients)

        inputs = [y, *(t for t in w if t is not None)]
        given = sum(t.nbytes for t in inputs)
        return measure_peak(step, model=torch.nn.Module(), inputs=inputs).total_bytes - given

    assert peak(3) == peak(1)
