"""Which implementation runs, what checks refuse, and what is asked of graph and autocast."""

from contextlib import contextmanager

import pytest
import torch
from ops.one_layer import Ops

from dbkernels.ops.backend import checks
from dbkernels.ops.backend import library as compiled
from dbkernels.ops.backend.register import (
    compute_dtype,
    dry_run_on_gpu,
    dry_run_processors,
    dtypes_as_they_are,
    implementation,
    is_last_to_read,
    register,
    registered,
    runs_as_on_gpu,
    use_implementation,
)
from dbkernels.ops.backend.tile import MAX_D, processors
from dbkernels.ops.layer.gradients import add_product


def registered_op(name, extra="float"):
    """y = 2 x by Triton's launcher and 3 x by torch's, so that the result names its maker."""
    return register(
        f"{name}(Tensor x, Tensor(a!) y, {extra} extra) -> ()",
        triton=lambda x, y, extra: y.copy_(2 * x + extra),
        torch_=lambda x, y, extra: y.copy_(3 * x + extra),
    )


@pytest.fixture(scope="module")
def op():
    return registered_op("test_multiply")


@contextmanager
def compiled_code(name, function):
    """What the compiled library does when it is loaded: an op gets code for a CPU."""

    def kernel(*args):
        function(*args)

    with torch.library._scoped_library("dbkernels_compiled", "IMPL") as library:
        library.impl(name, kernel, "CPU")
        yield


@pytest.fixture(scope="module")
def compiled_op():
    """y = 4 x by compiled code for a CPU."""
    op = registered_op("test_compiled", extra="SymInt")
    with compiled_code("test_compiled", lambda x, y, extra: y.copy_(4 * x + extra)):
        yield op


@pytest.fixture
def library(monkeypatch):
    """Pretends that the compiled library is there, or that it is missing for a reason."""

    def pretend(reason=None):
        compiled.serves.cache_clear()
        monkeypatch.setattr(compiled, "library", lambda: compiled.Library(reason))

    yield pretend
    compiled.serves.cache_clear()


def result(op, extra=0.5, dtype=torch.float32):
    x, y = torch.tensor([1.0, 10.0], dtype=dtype), torch.empty(2, dtype=dtype)
    assert op(x, y, extra) is None
    return y.tolist()


def test_the_device_decides_or_the_innermost_request_until_it_ends():
    assert implementation("cpu") == "torch"
    assert implementation(torch.device("cuda", 1)) == "triton"
    with pytest.raises(KeyError), use_implementation("triton"):
        with use_implementation("torch"):
            assert implementation("cuda") == "torch"
        assert implementation("cpu") == "triton"
        raise KeyError
    assert implementation("cpu") == "torch"


def test_is_a_well_formed_torch_op(op, compiled_op, library):
    library()
    for multiply, extra in ((op, 0.5), (compiled_op, 1)):
        torch.library.opcheck(multiply, (torch.ones(3), torch.empty(3), extra))


def test_compiled_code_runs_where_there_is_some(op, compiled_op, library):
    library()
    assert implementation("cpu", "test_compiled") == "cpp"
    assert implementation("cpu", "test_multiply") == implementation("cpu") == "torch"
    assert result(compiled_op, 1) == [5, 41] and result(op) == [3.5, 30.5]
    # which it has none of for a device that it does not know, and none at all without a library
    assert implementation("meta", "test_compiled") == "torch"
    library("not built")
    assert implementation("cpu", "test_compiled") == "torch"
    assert result(compiled_op, 1) == [4, 31]


def test_float64_is_for_plain_torch(compiled_op, library):
    library()
    assert result(compiled_op, 1, torch.float64) == [4, 31]
    x, y = torch.ones(1), torch.empty(1, dtype=torch.float64)
    compiled_op(x, y, 1)
    assert y.item() == 4


@pytest.mark.parametrize(
    ("rest", "args", "filled"),
    [
        # always float64, as an op that reads no floats has it by its meaning
        ("", (), 4),
        (", Tensor step, Tensor? scale", (torch.tensor(4), None), 4),
        (", Tensor step, Tensor? scale", (torch.tensor(4), torch.ones(1)), 3),
        (", Tensor step, Tensor? scale", (torch.tensor(4), torch.ones(1).double()), 3),
    ],
    ids=["none", "integers", "float32", "float64"],
)
def test_float64_is_chosen_by_floats_that_are_read(library, request, rest, args, filled):
    library()
    name = f"test_fill_{request.node.callspec.id}"
    schema = f"{name}(Tensor(a!) y{rest}) -> ()"
    op = register(schema, triton=None, torch_=lambda y, *args: y.fill_(3))
    y = torch.empty(1, dtype=torch.float64)
    with compiled_code(name, lambda y, *args: y.fill_(4)):
        op(y, *(a if a is None else a.to(y.device) for a in args))
    assert y.item() == filled


@pytest.mark.parametrize(("name", "times"), [("torch", 3), ("triton", 2)])
def test_runs_the_implementation_that_was_asked_for(op, compiled_op, library, name, times):
    library()
    with use_implementation(name):
        assert implementation("cpu", "test_compiled") == name
        assert result(op) == [times + 0.5, 10 * times + 0.5]
        assert result(compiled_op, 1) == [times + 1, 10 * times + 1]


def test_an_op_without_the_code_that_was_asked_for_says_what_it_has(
    op, compiled_op, library, monkeypatch
):
    library()
    with use_implementation("cpp"):
        assert result(compiled_op, 1) == [5, 41]
        message = "test_multiply has no implementation cpp on cpu, it has triton, torch"
        with pytest.raises(RuntimeError, match=message):
            result(op)
    # code for a GPU does not run on a CPU
    monkeypatch.setattr(compiled, "cuda_reason", lambda device: None)
    message = "test_compiled has no implementation cuda on cpu, it has cpp, triton, torch"
    with use_implementation("cuda"), pytest.raises(RuntimeError, match=message):
        result(compiled_op, 1)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cpp", RuntimeError, "implementation cpp cannot run: It was left out: no compiler."),
        ("cuda", RuntimeError, "implementation cuda cannot run: It was left out: no compiler."),
        ("triton", RuntimeError, "triton needs an NVIDIA GPU, or TRITON_INTERPRET=1"),
        ("eager", ValueError, "must be one of cpp, cuda, triton, torch, got eager"),
    ],
)
def test_refuses_an_implementation_that_nothing_here_runs(
    library, monkeypatch, name, error, message
):
    library("It was left out: no compiler.")
    monkeypatch.setattr(compiled, "cuda_reason", lambda device: compiled.library().reason)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(error, match=message), use_implementation(name):
        pass
    assert implementation("cpu") == "torch"


def test_knows_every_op_by_name():
    assert {"gelu_fwd", "gelu_bwd", "score_loss_fwd"} <= set(registered())
    with pytest.raises(ValueError, match=r"op must be one of .*adaln_norm_fwd, .*, got norm"):
        implementation("cpu", "norm")


def test_only_plain_torch_takes_float64():
    x = torch.empty(1, dtype=torch.float64)
    with use_implementation("torch"):
        checks.check_floats(x=x, bias=None)
        assert checks.result_dtype(torch.float64, x) == torch.float64
    with use_implementation("triton"):
        with pytest.raises(ValueError, match=r"x must be one of float32, .*, got torch.float64"):
            checks.check_floats(x=x)
        with pytest.raises(
            ValueError, match=r"dtype must be one of float32, .*, got torch.float64"
        ):
            checks.result_dtype(torch.float64, x)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 5), r"x and h must be \(B, T, D\), got \(2, 3, 4, 5\)"),
        ((2, 3, 0), "D must be 1 to 16384, got 0"),
        ((1, 1, MAX_D + 1), "D must be 1 to 16384, got 16385"),
    ],
)
def test_takes_tokens_up_to_the_widest_row(shape, message):
    checks.check_tokens(x=torch.empty(0, 3, MAX_D))
    with pytest.raises(ValueError, match=message):
        checks.check_tokens(x=torch.empty(shape), h=torch.empty(shape))


def slices(*shape):
    return torch.empty(*shape[:-1], 6 * shape[-1]).chunk(6, dim=-1)


def test_a_token_with_its_own_modulation_is_a_sample_and_no_modulation_is_copied():
    x = torch.randn(3, 2, 8).transpose(0, 1)
    per_sample, per_token = slices(2, 8)[1], slices(2, 3, 8)[1]
    for modulation, expected in ((per_sample, x), (per_token, x.reshape(6, 1, 8))):
        samples, rows = checks.rows_of_samples({"x": x}, {"shift": modulation})
        assert torch.equal(samples, expected) and samples.is_contiguous()
        assert rows.shape == (len(expected), 8) and rows.data_ptr() == modulation.data_ptr()


class Asks(torch.autograd.Function):
    """The identity, whose backward notes whether it is the last."""

    @staticmethod
    def forward(ctx, x, answers):
        ctx.answers = answers
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.answers.append(is_last_to_read())
        return dy, None


def test_the_last_to_read_is_the_backward_that_retains_no_graph():
    x, answers = torch.randn(3, requires_grad=True), []
    y = Asks.apply(x, answers).sum()
    for retain in (True, True, False):
        y.backward(retain_graph=retain)
    assert answers == [False, False, True]


def test_a_compiler_is_told_that_another_reads():
    compiled = torch.compile(lambda: is_last_to_read(), backend="eager", fullgraph=True)
    assert compiled() is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matmuls_run_in_the_dtype_of_the_weight_or_in_that_of_autocast(dtype):
    x, weight = torch.randn(3, 2), torch.randn(4, 2, dtype=dtype)
    assert compute_dtype(x, weight) == dtype
    with torch.autocast(x.device.type, torch.bfloat16):
        assert compute_dtype(x, weight) == torch.bfloat16
        # which has no autocast
        assert compute_dtype(x.to("meta"), weight.to("meta")) == dtype


def test_a_backward_can_leave_autocast():
    x = torch.randn(3, 3)
    with torch.autocast(x.device.type, torch.bfloat16):
        with dtypes_as_they_are(x.device.type):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with dtypes_as_they_are("meta"):
        assert (x @ x).dtype == torch.float32


# of a dry run


def test_a_cpu_goes_its_own_way_outside_a_dry_run_on_a_gpu():
    cpu = torch.device("cpu")
    x = torch.ones(2, device=cpu)
    assert not runs_as_on_gpu(x) and dry_run_processors() is None and processors(cpu) == 1
    with pytest.raises(KeyError), dry_run_on_gpu(132):
        assert runs_as_on_gpu(x) and dry_run_processors() == processors(cpu) == 132
        with dry_run_on_gpu(108):
            assert processors(cpu) == 108
        assert processors(cpu) == 132
        raise KeyError
    assert not runs_as_on_gpu(x) and dry_run_processors() is None and processors(cpu) == 1


def test_a_dry_run_on_a_gpu_multiplies_bfloat16_into_float32():
    left, right = torch.ones(2, 2, 2, dtype=torch.bfloat16, device="meta")
    with dry_run_on_gpu(132), Ops() as seen:
        add_product(torch.zeros(2, 2, device="meta"), left, right)
    assert "mm" in dict(seen.calls)  # which adds nothing, in the dtype that it is told
