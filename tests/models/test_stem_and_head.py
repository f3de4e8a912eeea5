import copy
import sysconfig
from contextlib import nullcontext

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models.tiny import (
    CONFIGS,
    DRAW,
    LEVEL,
    SCALE,
    dynamo_alone,
    every_family,
    levels_of,
    make_batch,
    make_model,
    noisy,
    randomise,
)
from ops.one_layer import assert_same_bits
from torch._dynamo.utils import counters
from torch._inductor import config, cpp_builder

from dbkernels.models import embed
from dbkernels.models.stem_and_head import compile_stem_and_head
from dbkernels.ops import Draw


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def compiled(family):
    """A model whose stem and head are compiled."""
    model = make_model(family)
    compile_stem_and_head(model, "cpu")
    return model


def compiled_graphs():
    return counters["stats"]["unique_graphs"]


def plain_twin(model):
    """Another with the same weights under the same names, of which nothing is compiled."""
    (family,) = (name for name, config in CONFIGS.items() if config == model.config)
    twin = make_model(family)
    twin.load_state_dict(model.state_dict())
    return twin


def step(model, layers=(1,), count=3, draw=DRAW):
    """The loss of a step on the first samples, and the gradients by name."""
    batch = {name: tensor[:count] for name, tensor in make_batch(model).items()}
    level, interval = levels_of(model)
    loss = model.loss(draw, level[:count], SCALE[:count], layers, batch, interval)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
    return {"loss": loss.detach(), **found}


def inputs_of(family):
    """Of each end, far from zero where sums could lose digits; a gradient where a step has one."""

    def moved(*shape, by=3):
        return (by + torch.randn(shape)).requires_grad_()

    if family == "mdm":
        return {"stem": (LEVEL / 50,), "tail": (moved(3, 7, 8, by=30), moved(3, 6, by=0))}
    if family in ("ar", "huginn"):
        z = moved(3, 7, 8)
        tail = moved(3, 7, 8, by=30), moved(3, 6, by=0), z, LEVEL
        return {"stem": (z, LEVEL, moved(3, 7, 8)), "tail": tail}
    if family == "mmdit":
        image = torch.randn(3, 3, *2 * [CONFIGS[family].image_size])
        stem = image, LEVEL / 50, torch.randn(3, 5, 7), torch.randn(3, 6)
        return {"stem": stem, "tail": (moved(3, 9, 8, by=30), moved(3, 8, by=0))}
    image, label = torch.randn(3, 3, *2 * [CONFIGS[family].image_size]), torch.tensor([3, 0, 2])
    if family == "vit":
        answer, c = moved(3, 8, by=30), moved(3, 6, by=0)
        head = answer, c, moved(3, 8), LEVEL, label
        return {"stem": (moved(3, 8), LEVEL, image), "cross_entropy": head}
    tail = moved(3, 9, 8, by=30), moved(3, 8, by=0)
    return {"stem": (image, LEVEL, moved(3, 8)), "tail": tail}


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


def exact_sinusoid(value, width, frequencies="open"):
    assert frequencies == "open"
    angle = value[:, None] * 10000.0 ** -torch.linspace(0, 1, width // 2 + 1).double()[:-1]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def in_float64(model, name, inputs, monkeypatch):
    tensors = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    asked = [t.requires_grad_(i.requires_grad) for t, i in zip(tensors, inputs, strict=True)]
    with monkeypatch.context() as patch:
        patch.setattr(embed, "sinusoid", exact_sinusoid)
        return run_end(copy.deepcopy(model).double(), name, asked)


@every_family
def test_compiled_stems_and_heads_are_as_accurate_as_plain_ones(compiled, family, monkeypatch):
    model, ends = plain_twin(compiled), inputs_of(family)
    assert set(ends) == set(model.stem_and_head)
    for name, inputs in ends.items():
        exact = in_float64(model, name, inputs, monkeypatch)
        plain, fused = (run_end(m, name, inputs) for m in (model, compiled))
        assert plain.keys() == fused.keys() == exact.keys()
        for key, expected in exact.items():
            assert_as_accurate_as_eager(f"{name}, {key}", fused[key], plain[key], expected)
    assert compiled_graphs() == 2


@every_family
def test_code_is_made_by_the_compiler_and_for_the_one_shape(family, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    compile_stem_and_head(make_model(family), "cpu")
    how = {"fullgraph": True, "dynamic": False, "options": {"deterministic": True}}
    assert asked == [how, how]


@pytest.fixture
def traced(monkeypatch):
    """Stands before `compiled`: what it compiles makes no kernels."""
    dynamo_alone(monkeypatch)


@every_family
def test_every_block_and_step_runs_the_same_code_and_half_a_batch_other_code(traced, compiled):
    for index, layers in enumerate([(0,), (1,), (2,), (0, 1), (1, 2)]):
        step(compiled, layers, draw=Draw(seed=3, step=index))
    assert compiled_graphs() == 2
    for count in (3, 2, 2, 3, 2):
        step(compiled, count=count)
    assert compiled_graphs() == 4


@every_family
def test_a_model_and_its_copy_run_the_same_ops_each_on_its_own_parameters(traced, compiled):
    other = randomise(copy.deepcopy(compiled))
    for model in (compiled, other):
        assert_same_bits(step(model), step(plain_twin(model)))
    assert compiled_graphs() == 2


@every_family
def test_without_a_gradient_nothing_is_compiled_and_no_bit_differs(compiled):
    plain, batch = plain_twin(compiled), make_batch(compiled)
    z, (level, _) = noisy(plain, batch), levels_of(plain)
    with torch.no_grad():
        for count in range(1, 4):
            part = {name: tensor[:count] for name, tensor in batch.items()}
            expected, actual = (
                m.denoise(z[:count], level[:count], (0, 2), part) for m in (plain, compiled)
            )
            assert torch.equal(actual, expected)
    assert compiled_graphs() == 0


def test_each_model_has_code_of_its_own_so_that_no_number_of_them_is_too_many(traced):
    with torch._dynamo.config.patch(recompile_limit=1):
        for count in (1, 2, 3):
            model = make_model("vit")
            compile_stem_and_head(model, "cpu")
            step(model)
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


@pytest.mark.parametrize(
    ("device", "tool", "missing"),
    [
        ("cpu", None, r"a C\+\+ compiler"),
        ("cpu", "gcc", r"a C\+\+ compiler"),
        ("cuda", None, "a C compiler"),
        ("cuda", "gcc", None),
        ("cuda", "clang", None),
        ("cuda", "CC", None),
        ("cpu", "no headers", r"the headers of Python \(Python.h\)"),
        ("cuda", "no headers", r"the headers of Python \(Python.h\)"),
    ],
)
def test_code_needs_headers_and_a_compiler_for_its_device(
    no_compiler, tmp_path, monkeypatch, device, tool, missing
):
    if tool == "CC":
        monkeypatch.setenv("CC", "my-compiler")
    elif tool == "no headers":
        places = {("include", "posix_prefix"): str(tmp_path)}
        monkeypatch.setattr(sysconfig, "get_path", lambda *asked: places[asked])
    elif tool:
        (tmp_path / tool).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    model, message = make_model("dit"), f"compile_stem_and_head needs {missing}.*, got none"
    with pytest.raises(ValueError, match=message) if missing else nullcontext():
        compile_stem_and_head(model, device)
    assert bool(vars(model).keys() & set(model.stem_and_head)) == (missing is None)
