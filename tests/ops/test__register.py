import pytest
import torch

from dbkernels.ops._register import implementation, register, use_implementation


@pytest.fixture(scope="module")
def op():
    """y = 2 x by Triton's launcher and 3 x by torch's, so that the result names its maker."""
    return register(
        "test_multiply(Tensor x, Tensor(a!) y, float extra) -> ()",
        triton=lambda x, y, extra: y.copy_(2 * x + extra),
        torch_=lambda x, y, extra: y.copy_(3 * x + extra),
    )


def result(op):
    x, y = torch.tensor([1.0, 10.0]), torch.empty(2)
    assert op(x, y, 0.5) is None
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


def test_refuses_an_unknown_implementation():
    with (
        pytest.raises(ValueError, match="implementation must be triton or torch, got cuda"),
        use_implementation("cuda"),
    ):
        pass


def test_refuses_triton_where_nothing_runs_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = "triton needs an NVIDIA GPU, or TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match=message), use_implementation("triton"):
        pass
    assert implementation("cpu") == "torch"
