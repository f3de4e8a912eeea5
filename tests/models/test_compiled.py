import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.memory.tracker import Tracker
from dbkernels.models.compiled import compiled

CPU = torch.device("cpu")
UNIT = 64 * 64 * 4  # bytes of each tensor here


def tensors(count, **options):
    return [torch.zeros(64, 64, **options) for _ in range(count)]


def peak_units(function, *inputs):
    """Of a call, beside its inputs, and of what comes back."""
    with Tracker(CPU) as tracker:
        tracker.tag(inputs, "inputs")
        out = function(*inputs)
    assert all(type(t) is type(inputs[0]) for t in (out if isinstance(out, tuple) else (out,)))
    return round(tracker.trace().peak().total_bytes / UNIT - len(inputs), 2)


def test_each_function_has_its_own_settings(monkeypatch):
    import torch._inductor.compile_fx as inductor

    def compile_fx(graph, inputs):
        budgets.append(torch._functorch.config.activation_memory_budget)
        return graph.forward

    budgets = []
    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    settings = [{"activation_memory_budget": 0.9}, {}, {"activation_memory_budget": 0.2}]
    for each in settings:
        compiled(torch.sin, each)(torch.ones(2))
    assert budgets == [0.9, 1.0, 0.2]
    assert torch._functorch.config.activation_memory_budget == 1.0


def test_functions_do_not_use_up_each_others_shapes(monkeypatch):
    import torch._inductor.compile_fx as inductor

    monkeypatch.setattr(inductor, "compile_fx", lambda graph, inputs: graph.forward)

    def double(x):
        return 2 * x

    for _ in range(3):
        function = compiled(double, {})
        for size in range(2, 8):
            assert torch.equal(function(torch.ones(size)), torch.full((size,), 2.0))


def test_a_graph_break_is_an_error():
    def function(x):
        torch._dynamo.graph_break()
        return x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(function, {})(torch.ones(2))


@pytest.mark.parametrize(
    ("function", "units"),
    [
        (lambda x, w: ((x.sin() * w).cos() + x).tanh(), 1),
        (lambda x, w: (x.sin() + 1).cos() @ w, 2),  # what a matmul reads is in memory
        (lambda x, w: ((x @ w).cos() @ w).sin(), 2),
        (lambda x, w: [((h := x.sin()) @ w, (h + 1).T)][0], 3),
        # views of what is in no memory are in none either
        (lambda x, w: sum(x.sin().view(2, 32, 64).transpose(0, 1).unbind(1)), 0.5),
        (lambda x, w: torch.nn.functional.layer_norm(x.exp(), (64,)) * 2, 1),
        # several results of one op, of which a view is kept
        (lambda x, w: torch.cat(x.cos().split(32)[::-1])[:32].T, 1),
    ],
)
def test_only_what_fused_kernels_write_is_allocated(function, units):
    with FakeTensorMode():
        inputs = tensors(2)
        # statistics of a norm are D times smaller than it
        assert units <= peak_units(compiled(function, {}), *inputs) < units + 0.1


@pytest.mark.parametrize("shape", [(64, 64), (32, 128)])
def test_what_a_fused_kernel_will_read_stays(shape):
    def function(x, w):
        h = (x @ w).sin().view(shape)  # reads the first product when the last is there
        return h * ((x @ x) @ w).view(shape)

    with FakeTensorMode():
        assert peak_units(compiled(function, {}), *tensors(2)) == 3


def test_results_have_the_layout_of_a_run():
    def function(x, w):
        return (x @ w).T.sin(), x.double() + 1, w[:3].exp()

    with FakeTensorMode():
        predicted = compiled(function, {})(*tensors(2))
        expected = function(*tensors(2))
    for a, b in zip(predicted, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_a_backward_frees_what_was_kept_with_its_last_use():
    def function(x, w):
        return ((x @ w).relu() @ w).relu()

    with FakeTensorMode():
        function = compiled(function, {})
        (x, w), (dy,) = tensors(2, requires_grad=True), tensors(1)
        function(x, w).backward(dy)
        x.grad = w.grad = None
        with Tracker(CPU) as tracker:
            tracker.tag((x, w, dy), "inputs")
            function(x, w).backward(dy)
        peak = tracker.trace().peak().total_bytes / UNIT
    assert round(peak, 2) == 8  # the inputs, and 5 at each of three moments
