from contextlib import contextmanager

import pytest
import torch

from dbkernels.ops.backend import library as compiled
from dbkernels.ops.backend.register import implementation, register, registered, use_implementation


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
