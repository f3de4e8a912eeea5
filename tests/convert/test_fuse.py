"""`fuse` and `unfuse`: what they replace, what they leave, and what they refuse."""

import copy
import io

import pytest
import torch
from convert import published
from convert.fused_cases import Network, basic, dit_block, lightning, vit
from convert.published import D
from convert.their_dit import DiT, losses
from convert.variations import VARIATIONS
from models.tiny import randomise
from torch import nn

from dbkernels.convert import fuse, unfuse
from dbkernels.convert.fused.dit_block import FusedDiTBlock
from dbkernels.convert.fused.layer import FusedLayer
from dbkernels.ops import POLICIES


def network(count=2):
    torch.manual_seed(3)
    return Network(*(dit_block().module for _ in range(count)))


def varied(name):
    block = published.Block()
    VARIATIONS[name][0](block)
    return block


def snapshot(model):
    """All that may tell that something was done to a model."""
    modules = {
        name: (id(module), repr(module), module.training)
        for name, module in model.named_modules(remove_duplicate=False)
    }
    tensors = {name: (id(t), t.clone()) for name, t in model.named_parameters()}
    return modules, {name: (key, t.tolist()) for name, (key, t) in tensors.items()}


def test_what_is_replaced_and_what_is_left_is_told_by_path():
    model = network()
    model.blocks.append(varied("relu"))
    model.blocks.append(nn.TransformerEncoderLayer(D, 2))
    report = fuse(model)
    assert [tuple(each) for each in report.replaced] == [
        ("blocks.0", "Block"),
        ("blocks.1", "Block"),
    ]
    left = {path: (kind, why) for path, kind, why in report.left}
    assert left.keys() == {"embed", "head", "blocks.2", "blocks.3"}
    assert left["blocks.2"][0] == "Block"
    assert "mlp.act must be a plain GELU" in left["blocks.2"][1]
    assert left["blocks.3"] == ("TransformerEncoderLayer", "no layer of a class that is known")
    assert "blocks.2  Block: mlp.act must be" in str(report)


DROPS = [name for name, (_, named) in VARIATIONS.items() if named is None and "dropout" in name]
REFUSED = [name for name, (_, named) in VARIATIONS.items() if named is not None]


@pytest.mark.parametrize("name", [*REFUSED, *DROPS])
def test_what_no_fused_layer_computes_is_left_as_it_is(name):
    model = Network(varied(name))
    before = snapshot(model)
    report = fuse(model)
    assert not report.replaced
    assert "blocks.0" in {path for path, _, _ in report.left}
    assert snapshot(model) == before


def test_each_layer_that_may_compute_something_else_is_compared():
    blocks = [randomise(kind()) for kind in (published.Block, published.Parallel)]
    blocks += [randomise(published.Functional()) for _ in range(2)]
    blocks[3].eps = 1e-2  # of the same class, and no part shows it
    report = fuse(Network(*blocks))
    assert [each.path for each in report.replaced] == ["blocks.0", "blocks.2"]
    assert "blocks.1  Parallel: the forward of Parallel must compute what its parts" in str(report)


def put(path, module):
    return lambda layer: layer.set_submodule(path, module)


def both_norms(block):
    for name in ("attn.q_norm", "attn.k_norm"):
        block.set_submodule(name, nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("made", "change", "why"),
    [
        (lightning, put("norm1", nn.GroupNorm(1, D)), "norm1 must be one of LayerNorm, RMSNorm"),
        (lightning, put("norm2", nn.LayerNorm(D)), "norm2 must be of the kind of norm1, rms"),
        (lightning, put("attn.q_norm", nn.Identity()), "must be norms or neither, got attn.k_n"),
        (lightning, lambda b: setattr(b.attn, "num_heads", 5), "attn.num_heads must divide 12"),
        (lightning, put("mlp.w3", nn.Linear(6, D)), "mlp.w12 must have rows for 6, got 14"),
        (lightning, put("attn.proj_drop", nn.Dropout(0.1)), "attn.proj_drop.p must be 0"),
        (lightning, put("mlp.w3", published.LoRALinear()), "mlp.w3 must be a plain Linear"),
        (lightning, lambda b: b.mlp.half(), "mlp.w12.weight must be torch.float32 as attn.qkv"),
        (lightning, lambda b: setattr(b, "wo_shift", True), "a LightningDiTBlock must run as"),
        (vit, put("mlp.act", nn.SiLU()), "mlp.act must be one of GELU, GELUTanh, got SiLU"),
        (vit, put("attn.q_norm", nn.LayerNorm(4)), "must be norms or neither, got attn.q_norm"),
        (vit, both_norms, "attn.k_norm must be the same RMS norm, got Norm(kind='layer'"),
        (vit, put("ls2", nn.Linear(D, D)), "ls2 must be an Identity or have gamma, got Linear"),
        (vit, lambda b: setattr(b.drop_path1, "drop_prob", 0.2), "drop_path1.drop_prob must be 0"),
        (vit, put("attn.norm", nn.LayerNorm(D)), "must compute what its parts say, got a result"),
        (vit, lambda b: setattr(b, "forward", lambda x: x), "must have the forward of its class"),
        (vit, lambda b: b.to("meta"), "a ViTBlock must have numbers, got tensors on meta"),
    ],
)
def test_what_is_left_is_named(made, change, why):
    module = made().module
    change(module)
    model = Network(module)
    report = fuse(model)
    assert not report.replaced
    assert any(why in each.why for each in report.left), str(report)


def test_a_method_of_its_own_is_named():
    class Own(published.Block):
        def _apply(self, fn, recurse=True):
            return super()._apply(fn, recurse)

    report = fuse(Network(Own()))
    assert "a Own must have the _apply of a Module, got its own" in str(report)


def test_fuse_then_unfuse_is_the_identity():
    model, (_, given) = network(), dit_block()
    before, expected = snapshot(model), model(*given)
    fuse(model)
    assert all(isinstance(block, FusedLayer) for block in model.blocks)
    torch.testing.assert_close(model(*given), expected, rtol=1e-5, atol=1e-4)
    assert [each.path for each in unfuse(model)] == ["blocks.0", "blocks.1"]
    assert snapshot(model) == before
    assert torch.equal(model(*given), expected)
    assert unfuse(model) == ()
    fuse(model)  # and again


@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("first", ["fuse", "optimizer"])
def test_the_published_training_loop_has_the_same_losses(first, recompute):
    torch.manual_seed(0)
    model = DiT()
    fused, states, found = copy.deepcopy(model), [], []
    for each in (model, fused):
        if each is fused and first == "fuse":
            fuse(each, recompute)
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-4, weight_decay=0)
        if each is fused and first == "optimizer":
            fuse(each, recompute)
        found.append(losses(each, optimizer))
        states.append(each.state_dict())
    unfuse(fused)
    assert len(set(found[0])) == 6
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) < 1e-6
    assert states[0].keys() == states[1].keys() == fused.state_dict().keys()
    for name, t in fused.state_dict().items():
        assert torch.equal(t, states[1][name])
        torch.testing.assert_close(t, states[0][name], rtol=0, atol=1e-5)


MOVES = {
    "load": lambda model, state: model.load_state_dict(state),
    "assign": lambda model, state: model.load_state_dict(state, assign=True),
    "double": lambda model, state: model.double().load_state_dict(state),
    "bfloat16": lambda model, state: model.bfloat16().load_state_dict(state),
    "meta": lambda model, state: model.to("meta").load_state_dict(state, assign=True),
    "empty": lambda model, state: model.to("meta").to_empty(device="cpu").load_state_dict(state),
}


def single():
    return basic("ada_norm_single", attention_bias=True)  # which has a parameter of its own


@pytest.mark.parametrize("made", [dit_block, lightning, vit, single])
@pytest.mark.parametrize("move", MOVES)
def test_a_state_dict_loads_and_saves_as_that_of_the_original(move, made):
    given = made().given
    plain, model = Network(made().module), Network(made().module)
    state = copy.deepcopy(Network(randomise(made().module)).state_dict())
    fuse(model)
    for each in (plain, model):
        MOVES[move](each, state)
    dtype = next(plain.parameters()).dtype
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, t in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], t)
    given = [t.to(dtype) if isinstance(t, torch.Tensor) else t for t in given]
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(model(*given), plain(*given), rtol=tolerance, atol=tolerance)
    fused = model(*given)
    unfuse(model)
    assert torch.equal(model(*given), plain(*given))
    assert dtype == torch.float64 or not torch.equal(fused, torch.zeros_like(fused))


def test_a_copy_and_a_pickle_are_models_of_their_own():
    (_, given), model = dit_block(), network()
    fuse(model)
    expected = model(*given)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(*given), expected)
        with torch.no_grad():
            other.blocks[0].attn.qkv.weight.zero_()
        assert not torch.equal(other(*given), expected)
        changed = other(*given)
        unfuse(other)
        assert isinstance(other.blocks[0], published.Block)
        torch.testing.assert_close(other(*given), changed, rtol=1e-5, atol=1e-4)
    assert torch.equal(model(*given), expected)


def test_hooks_and_attributes_of_a_layer_go_on():
    (_, given), model, seen = dit_block(), network(), []
    model.blocks[0].number = 7
    model.blocks[0].register_forward_hook(lambda module, x, y: seen.append(module))
    fuse(model)
    model(*given)
    assert seen == [model.blocks[0]]
    assert model.blocks[0].number == 7


def test_the_mode_of_now_stays_with_the_original():
    model = network()
    fuse(model)
    model.eval()
    unfuse(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("attn.qkv", published.LoRALinear()), "attn.qkv must be a plain Linear as it was made"),
        (lambda b: b.mlp.fc1.register_forward_hook(print), "mlp.fc1 .* one with forward hooks"),
        (lambda b: setattr(b.mlp.drop2, "p", 0.1), "mlp.drop2 .* got p 0.1 in place of 0.0"),
        (lambda b: setattr(b.attn, "num_heads", 2), "attn .* got num_heads 2 in place of 3"),
    ],
)
def test_what_would_be_left_out_of_a_fused_layer_raises_by_name(change, message):
    (_, given), model = dit_block(), network()
    fuse(model)
    change(model.blocks[1])
    with pytest.raises(RuntimeError, match=message):
        model(*given)


def test_a_layer_at_two_places_stays_one_layer():
    (_, given), block = dit_block(), dit_block().module
    model = Network(block, dit_block().module, block)
    expected = model(*given)
    assert len(fuse(model).replaced) == 3
    assert model.blocks[0] is model.blocks[2]
    torch.testing.assert_close(model(*given), expected, rtol=1e-4, atol=1e-3)
    unfuse(model)
    assert model.blocks[0] is model.blocks[2] is block


def test_what_is_compiled_already_is_left():
    model = network()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    report = fuse(model)
    assert [each.path for each in report.replaced] == ["blocks.0"]
    assert "blocks.1._orig_mod  Block: inside a compiled module" in str(report)


def test_a_fused_model_compiles_and_exports():
    (_, given), model = dit_block(), network(1)
    fuse(model)
    expected = model(*given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), expected, rtol=1e-5, atol=1e-4)
    program = torch.export.export(model, given)
    torch.testing.assert_close(program.module()(*given), expected, rtol=1e-5, atol=1e-4)


def test_an_error_on_the_way_leaves_all_as_it_was(monkeypatch):
    made = []

    class Broken(FusedDiTBlock):
        def __init__(self, original, recompute):
            if made:
                raise KeyError("a mistake of a reader")
            super().__init__(original, recompute)
            made.append(self)

    model = network()
    before = snapshot(model)
    monkeypatch.setattr("dbkernels.convert.fusion.KNOWN", (Broken,))
    monkeypatch.setattr("dbkernels.convert.fusion.check_same", lambda layer: None)
    with pytest.raises(KeyError):
        fuse(model)
    assert snapshot(model) == before


def half():
    model, other = network(), network()
    fuse(model)
    other.blocks[1] = model.blocks[1]
    return other


def fused():
    model = network()
    fuse(model)
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fuse(published.Block), "model must be a torch.nn.Module, got a type"),
        (lambda: unfuse([published.Block()]), "model must be a torch.nn.Module, got a list"),
        (lambda: fuse(network(), "all"), f"recompute must be one of {', '.join(POLICIES)}, got al"),
        (lambda: fuse(published.Block()), "model must be what holds the layers, got one layer its"),
        (lambda: fuse(fused()), "model must have no fused layers, got 2 of them, .* blocks.0: cal"),
        (lambda: fuse(half()), "model must have no fused layers, got 1 of them, .* is blocks.1"),
        (lambda: fuse(fused().blocks[0]), "model must have no fused layers, got 1 of them"),
        (lambda: unfuse(fused().blocks[0]), "model must be what holds the fused layers, got one"),
        (lambda: fused().blocks[0](torch.ones(2, 3, D), torch.ones(2, 3, 7)), r"c must be \(B, co"),
        (
            lambda: fused().blocks[0](torch.ones(2, 3, D), torch.ones(3, 7)),
            r"\(2, cond_dim\), got \(3",
        ),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
