from contextlib import contextmanager

import pytest
import torch

from dbkernels.ops.backend import library as compiled
from dbkernels.ops.backend.register import implementation, register, registered, use_implementation


@pytest.fixture(scope="module")
def op():
    """y = 2 x by Triton's launcher and 3 x by torch's, so that the result names its maker."""
    return register(
        "test_multiply(Tensor x, Tensor(a!) y, float extra) -> ()",
        triton=lambda x, y, extra: y.copy_(2 * x + extra),
        torch_=lambda x, y, extra: y.copy_(3 * x + extra),
    )


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
    """y = 2 x by Triton's launcher, 3 x by torch's and 4 x by compiled code for a CPU."""
    schema = "test_compiled(Tensor x, Tensor(a!) y, SymInt extra) -> ()"
    op = register(
        schema,
        triton=lambda x, y, extra: y.copy_(2 * x + extra),
        torch_=lambda x, y, extra: y.copy_(3 * x + extra),
    )
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


@pytest.mark.parametrize(("name", "expected"), [("triton", [2.5, 20.5]), ("torch", [3.5, 30.5])])
def test_runs_the_implementation_that_was_asked_for(op, name, expected):
    with use_implementation(name):
        assert result(op) == expected


def test_the_device_decides_where_nothing_was_asked_for():
    assert implementation("cpu") == "torch"
    assert implementation(torch.device("cuda", 1)) == "triton"


def test_the_innermost_request_counts_and_the_outer_one_comes_back():
    with use_implementation("triton"):
        with use_implementation("torch"):
            assert implementation("cuda") == "torch"
        assert implementation("cpu") == "triton"
    assert implementation("cpu") == "torch"


def test_a_request_ends_with_an_exception():
    with pytest.raises(KeyError), use_implementation("triton"):
        raise KeyError
    assert implementation("cpu") == "torch"


def test_is_a_well_formed_torch_op(op):
    torch.library.opcheck(op, (torch.ones(3), torch.empty(3), 0.5))


def test_compiles_as_one_op_that_writes_into_its_argument(op):
    def f(x):
        y = torch.empty_like(x)
        op(x, y, 0.0)
        return y + 1

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    with use_implementation("torch"):
        assert compiled(torch.tensor([2.0])).item() == 7


def test_compiled_code_runs_where_there_is_some(op, compiled_op, library):
    library()
    assert implementation("cpu", "test_compiled") == "cpp"
    assert implementation("cpu", "test_multiply") == implementation("cpu") == "torch"
    assert result(compiled_op, 1) == [5, 41] and result(op) == [3.5, 30.5]


def test_compiled_code_has_plain_integers_for_symbolic_ones(compiled_op):
    schema = str(torch.ops.dbkernels_compiled.test_compiled.default._schema)
    assert "(Tensor x, Tensor(a!) y, int extra)" in schema
    assert "SymInt extra" in str(compiled_op._schema)


def test_without_the_library_plain_torch_runs(compiled_op, library):
    library("not built")
    assert implementation("cpu", "test_compiled") == "torch"
    assert result(compiled_op, 1) == [4, 31]


def test_float64_is_for_plain_torch(compiled_op, library):
    library()
    assert result(compiled_op, 1, torch.float64) == [4, 31]
    x, y = torch.ones(1), torch.empty(1, dtype=torch.float64)
    compiled_op(x, y, 1)
    assert y.item() == 4


def test_an_output_that_is_always_float64_is_for_compiled_code_too(library):
    library()
    op = register("test_fill(Tensor(a!) y) -> ()", triton=None, torch_=lambda y: y.fill_(3))
    y = torch.empty(1, dtype=torch.float64)
    with compiled_code("test_fill", lambda y: y.fill_(4)):
        op(y)
    assert y.item() == 4


def test_integers_that_are_read_are_no_choice_of_float64(library):
    library()
    schema = "test_fill_with(Tensor(a!) y, Tensor step, Tensor? scale) -> ()"
    op = register(schema, triton=None, torch_=lambda y, step, scale: y.fill_(3))
    y, step = torch.empty(1, dtype=torch.float64), torch.tensor(4)
    with compiled_code("test_fill_with", lambda y, step, scale: y.copy_(step)):
        op(y, step, None)
        assert y.item() == 4
        for scale in (torch.ones(1), torch.ones(1).double()):
            op(y, step, scale)
            assert y.item() == 3
            y.zero_()


def test_the_library_has_nothing_for_a_device_that_it_does_not_know(compiled_op, library):
    library()
    assert implementation("meta", "test_compiled") == "torch"


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_compiled_code_is_left_out_where_another_was_asked_for(compiled_op, library, name):
    library()
    with use_implementation(name):
        assert implementation("cpu", "test_compiled") == name
        assert result(compiled_op, 1) == {"torch": [4, 31], "triton": [3, 21]}[name]


def test_an_op_without_the_code_that_was_asked_for_says_what_it_has(op, compiled_op, library):
    library()
    with use_implementation("cpp"):
        assert result(compiled_op, 1) == [5, 41]
        message = "test_multiply has no implementation cpp on cpu, it has triton, torch"
        with pytest.raises(RuntimeError, match=message):
            result(op)


def test_code_for_a_gpu_does_not_run_on_a_cpu(compiled_op, library, monkeypatch):
    library()
    monkeypatch.setattr(compiled, "cuda_reason", lambda device: None)
    message = "test_compiled has no implementation cuda on cpu, it has cpp, triton, torch"
    with use_implementation("cuda"), pytest.raises(RuntimeError, match=message):
        result(compiled_op, 1)


@pytest.mark.parametrize("name", ["cpp", "cuda"])
def test_refuses_compiled_code_where_there_is_none(library, monkeypatch, name):
    library("It was left out: no compiler.")
    monkeypatch.setattr(compiled, "cuda_reason", lambda device: compiled.library().reason)
    message = f"implementation {name} cannot run: It was left out: no compiler."
    with pytest.raises(RuntimeError, match=message), use_implementation(name):
        pass
    assert implementation("cpu") == "torch"


def test_a_compiled_op_is_a_well_formed_torch_op(compiled_op, library):
    library()
    torch.library.opcheck(compiled_op, (torch.ones(3), torch.empty(3), 1))


def test_refuses_an_op_that_it_does_not_know():
    with pytest.raises(ValueError, match=r"op must be one of .*adaln_norm_fwd, .*, got norm"):
        implementation("cpu", "norm")


def test_names_every_op():
    assert {"gelu_fwd", "gelu_bwd", "score_loss_fwd"} <= set(registered())


def test_refuses_an_unknown_implementation():
    message = "implementation must be one of cpp, cuda, triton, torch, got eager"
    with pytest.raises(ValueError, match=message), use_implementation("eager"):
        pass


def test_refuses_triton_where_nothing_runs_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = "triton needs an NVIDIA GPU, or TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match=message), use_implementation("triton"):
        pass
    assert implementation("cpu") == "torch"
