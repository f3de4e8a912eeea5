import copy
import sysconfig

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models.tiny import dynamo_alone, randomise
from torch._dynamo.utils import counters
from torch._inductor import config, cpp_builder
from training.tiny import DIT, VIT

from dbkernels.models import FAMILIES, embed
from dbkernels.models.stem_and_head import compile_stem_and_head
from dbkernels.ops import Draw

LEVEL = torch.tensor([0.05, 0.4, 2.0, 40.0])
DRAW = Draw(seed=3, step=1)
both = pytest.mark.parametrize("family", ["vit", "dit"])


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    counters.clear()


def make_model(family):
    return randomise(FAMILIES[family].model({"vit": VIT, "dit": DIT}[family]))


def make_batch():
    return {"image": torch.randn(4, 1, 4, 4), "label": torch.tensor([2, 0, 1, 1])}


def compiled_graphs():
    return counters["stats"]["unique_graphs"]


def step(model, layers=(1,), batch=None, draw=DRAW):
    batch = make_batch() if batch is None else batch
    level = LEVEL[: len(batch["label"])]
    loss = model.loss(draw, level, torch.full_like(level, 1 / len(level)), layers, batch)
    loss.backward()
    return loss.detach()


def inputs_of(family):
    """Of each end, far from zero where sums could lose digits; a gradient where a step has one."""
    rows = 3 + torch.randn(4, 16)
    label = torch.tensor([2, 0, 1, 1])
    if family == "vit":
        stem = (rows.clone().requires_grad_(), LEVEL, torch.randn(4, 1, 4, 4))
        answer, c = 30 + torch.randn(4, 16), torch.randn(4, 8)
        moved = (tensor.requires_grad_() for tensor in (answer, c, rows))
        return {"stem": stem, "cross_entropy": (*moved, LEVEL, label)}
    stem = (torch.randn(4, 1, 4, 4), LEVEL, rows.clone().requires_grad_())
    tail = (30 + torch.randn(4, 4, 16), torch.randn(4, 16))
    return {"stem": stem, "tail": tuple(tensor.requires_grad_() for tensor in tail)}


def run_end(model, name, inputs):
    """What an end gives, and the gradients of all that it read, by name."""
    outputs = getattr(model, name)(*inputs)
    y = torch.cat([t.flatten() for t in (outputs if isinstance(outputs, tuple) else (outputs,))])
    read = {f"input{i}": t for i, t in enumerate(inputs) if t.requires_grad}
    read |= dict(model.named_parameters())
    dy = torch.linspace(-1, 1, len(y), dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, list(read.values()), dy, allow_unused=True)
    found = {key: grad for key, grad in zip(read, grads, strict=True) if grad is not None}
    return {"y": y.detach(), **found}


def exact_sinusoid(value, width):
    angle = value[:, None] * 10000.0 ** -torch.linspace(0, 1, width // 2 + 1).double()[:-1]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def in_float64(model, name, inputs, monkeypatch):
    tensors = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    asked = [t.requires_grad_(i.requires_grad) for t, i in zip(tensors, inputs, strict=True)]
    with monkeypatch.context() as patch:
        patch.setattr(embed, "sinusoid", exact_sinusoid)
        return run_end(copy.deepcopy(model).double(), name, asked)


@both
def test_compiled_stems_and_heads_are_as_accurate_as_plain_ones(family, monkeypatch):
    model = make_model(family)
    fused = copy.deepcopy(model)
    compile_stem_and_head(fused, "cpu")
    stem_and_head = inputs_of(family)
    assert set(stem_and_head) == set(model.stem_and_head)
    for name, inputs in stem_and_head.items():
        exact = in_float64(model, name, inputs, monkeypatch)
        plain, compiled = (run_end(m, name, inputs) for m in (model, fused))
        assert plain.keys() == compiled.keys() == exact.keys()
        for key, expected in exact.items():
            label = f"{name}, {key}"
            assert_as_accurate_as_eager(label, compiled[key], plain[key], expected)
    assert compiled_graphs() == 2


@both
def test_code_is_made_by_the_compiler_and_for_the_one_shape(family, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    model = make_model(family)
    compile_stem_and_head(model, "cpu")
    how = {"fullgraph": True, "dynamic": False, "options": {"deterministic": True}}
    assert asked == [how, how]


@both
def test_every_block_and_every_step_runs_the_same_code(family, monkeypatch):
    dynamo_alone(monkeypatch)
    model = make_model(family)
    compile_stem_and_head(model, "cpu")
    for index, layers in enumerate([(0,), (1,), (2,), (0, 1), (1, 2)]):
        step(model, layers, draw=Draw(seed=3, step=index))
    assert compiled_graphs() == 2


@both
def test_half_a_batch_is_compiled_once_more(family, monkeypatch):
    dynamo_alone(monkeypatch)
    model, batch = make_model(family), make_batch()
    compile_stem_and_head(model, "cpu")
    half = {name: tensor[:2] for name, tensor in batch.items()}
    for each in (batch, half, half, batch, half):
        step(model, batch=each)
    assert compiled_graphs() == 4


@both
def test_a_step_runs_the_same_ops_on_the_same_parameters(family, monkeypatch):
    dynamo_alone(monkeypatch)
    model, batch = make_model(family), make_batch()
    fused = copy.deepcopy(model)
    names = list(model.state_dict())
    compile_stem_and_head(fused, "cpu")
    assert list(fused.state_dict()) == names
    assert torch.equal(step(fused, batch=batch), step(model, batch=batch))
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (model, fused)]
    for name, grad in grads[0].items():
        other = grads[1][name]
        assert (grad is other is None) or torch.equal(grad, other), name


@both
def test_without_a_gradient_nothing_is_compiled_and_no_bit_differs(family):
    model, batch = make_model(family), make_batch()
    fused = copy.deepcopy(model)
    compile_stem_and_head(fused, "cpu")
    z = torch.randn_like(model.target(batch))
    with torch.no_grad():
        for count in range(1, 5):
            part = {name: tensor[:count] for name, tensor in batch.items()}
            expected, actual = (
                m.denoise(z[:count], LEVEL[:count], (0, 2), part) for m in (model, fused)
            )
            assert torch.equal(actual, expected)
    assert compiled_graphs() == 0


@both
def test_a_copy_has_its_own_parameters_and_the_same_code(family, monkeypatch):
    dynamo_alone(monkeypatch)
    model, batch = make_model(family), make_batch()
    compile_stem_and_head(model, "cpu")
    step(model, batch=batch)
    model.zero_grad()
    other = copy.deepcopy(model)
    randomise(other)
    fresh = make_model(family)
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(step(other, batch=batch), step(fresh, batch=batch))
    assert all(p.grad is None for p in model.parameters())
    assert other.head.weight.grad.any() and compiled_graphs() == 2


def test_each_model_has_code_of_its_own_so_that_no_number_of_them_is_too_many(monkeypatch):
    dynamo_alone(monkeypatch)
    batch = make_batch()
    with torch._dynamo.config.patch(recompile_limit=1):
        for count in (1, 2, 3):
            model = make_model("vit")
            compile_stem_and_head(model, "cpu")
            step(model, batch=batch)
            assert compiled_graphs() == 2 * count


@pytest.fixture
def no_compiler(monkeypatch):
    """Nothing is found on PATH or by a variable."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    cpp_builder.cpp_compiler_search.cache_clear()
    # what CXX says is read when torch is imported
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.parametrize(("device", "kind"), [("cpu", r"a C\+\+"), ("cuda", "a C")])
def test_rejects_a_machine_without_a_compiler(device, kind, no_compiler):
    model = make_model("dit")
    with pytest.raises(
        ValueError, match=f"compile_stem_and_head needs {kind} compiler: .*, got none"
    ):
        compile_stem_and_head(model, device)
    assert not vars(model).keys() & set(model.stem_and_head)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_gpus_code_needs_either_c_compiler_or_the_one_that_is_named(
    name, no_compiler, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setenv("CC", "my-compiler")
        compile_stem_and_head(make_model("dit"), "cuda")
    (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    compile_stem_and_head(make_model("dit"), "cuda")
    with pytest.raises(ValueError, match=r"a C\+\+ compiler"):
        compile_stem_and_head(make_model("dit"), "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rejects_a_python_without_headers(device, tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(sysconfig, "get_path", lambda *asked: places.append(asked) or str(tmp_path))
    with pytest.raises(ValueError, match=r"needs the headers of Python \(Python.h\), got none"):
        compile_stem_and_head(make_model("vit"), device)
    assert places == [("include", "posix_prefix")]
