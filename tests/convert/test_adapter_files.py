"""Adapters in files: they come back, they merge, and the libraries' own code computes the same."""

import copy
import json
import warnings

import pytest
import torch
from convert.their_networks import filled
from models.tiny import make_model, randomise
from safetensors.torch import load_file, save_file

from dbkernels.convert import load, load_adapters, merge_adapter_files, save_adapters
from dbkernels.data.images import ImageData
from dbkernels.models import DiT, DiTConfig, add_adapters, merge_adapters, remove_adapters
from dbkernels.models.adapter import adapters_in
from dbkernels.models.layer import run_layers
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.trainer import Trainer

F64 = torch.float64
SPLIT = ("q", "k", "v", "out", "fc1", "fc2", "modulation")
SIZES = {"dim": 16, "depth": 2, "num_heads": 2, "image_size": 4, "patch": 2, "num_classes": 3}
CONFIG = DiTConfig(**SIZES, channels=3, process="vp", prediction="epsilon", frequencies="closed")
STEPS, LABEL = torch.tensor([0, 400, 999]), torch.tensor([2, 0, 3])


def make(targets=SPLIT, alpha=3.0, rank=2, layers=None):
    torch.manual_seed(0)
    model = randomise(DiT(CONFIG))
    add_adapters(model, rank=rank, alpha=alpha, targets=targets, layers=layers)
    for _, adapter in adapters_in(model):
        randomise(adapter)
    return model


def without(model):
    other = copy.deepcopy(model)
    remove_adapters(other)
    return other


def merged_weights(model):
    other = copy.deepcopy(model).double()
    merge_adapters(other)
    return other.state_dict()


def assert_same_function(found, expected, tolerance=1e-12):
    found, expected = merged_weights(found), merged_weights(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def adapters_of(model):
    return {place[:2]: adapter for place, adapter in adapters_in(model)}


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
@pytest.mark.parametrize("names", ["own", "dit", "diffusers"])
@pytest.mark.parametrize("targets", [SPLIT, ("qkv", "fc2"), ("k",)], ids=str)
def test_what_is_saved_comes_back(tmp_path, layout, names, targets):
    model = make(targets)
    save_adapters(model, tmp_path / "adapters", layout, names=names)
    other = without(model)
    load_adapters(other, tmp_path / "adapters")
    # in another code's names the same may lie in fewer or in more projections
    assert_same_function(
        other, model, 1e-12 if names == "diffusers" or "q" not in targets else 1e-6
    )
    assert not any(p.requires_grad for name, p in other.named_parameters() if "adapt" not in name)
    if names == "diffusers" and "qkv" not in targets:
        assert adapters_of(other).keys() == adapters_of(model).keys()
        for key, adapter in adapters_of(model).items():
            again = adapters_of(other)[key]
            assert again.alpha == 3.0 and again.start == adapter.start
            assert torch.equal(again.down, adapter.down) and torch.equal(again.up, adapter.up)


@pytest.mark.parametrize("family", ["vit", "ar", "mmdit"])
def test_any_family_has_its_own_names(tmp_path, family):
    model = make_model(family)
    add_adapters(model, rank=2, alpha=1.0, targets=("qkv", "modulation"))
    randomise(next(adapters_in(model))[1])
    save_adapters(DiffusionBlocks(model), tmp_path, "peft")
    other = DiffusionBlocks(without(model))
    load_adapters(other, tmp_path)
    assert_same_function(other.model, model)
    with pytest.raises(ValueError, match=r"names must be own for a .*, got diffusers"):
        save_adapters(model, tmp_path, "peft", names="diffusers")


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_files_of_blocks_merge_into_one_of_all(tmp_path, layout):
    model = make()
    first, second = (DiffusionBlocks(model, 2)[index].layers for index in (0, 1))
    other = without(model)  # trained elsewhere, of another rank, alpha and targets
    add_adapters(other, rank=3, alpha=7.5, targets=("q", "fc1"), layers=second)
    randomise(other.layers[1].mlp.fc1.adapters)
    save_adapters(model, tmp_path / "a", layout, layers=first, base="dit")
    save_adapters(other, tmp_path / "b", layout, layers=second, base="dit")
    merge_adapter_files([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    whole = without(model)
    load_adapters(whole, tmp_path / "all")
    parts = {**adapters_of(model), **adapters_of(other)}
    kept = {key for key in adapters_of(model) if key[0] == "layers.0"} | adapters_of(other).keys()
    assert adapters_of(whole).keys() == kept
    for key, adapter in adapters_of(whole).items():
        assert adapter.alpha == parts[key].alpha and torch.equal(adapter.up, parts[key].up)


DIT = "diffusers.models.transformers.dit_transformer_2d"


def their_model(folder):
    """A small random network of diffusers' own class, and a folder of it."""
    module = pytest.importorskip(DIT)
    torch.manual_seed(1)
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    settings |= {"in_channels": 3, "out_channels": 6, "sample_size": 4, "num_embeds_ada_norm": 3}
    model = module.DiTTransformer2DModel(**settings).eval()
    there = model.state_dict()
    tensors = filled({name: tuple(t.shape) for name, t in there.items()})
    for name in tensors:
        if ".emb." in name:  # which each layer has again
            tensors[name] = tensors[name.replace("blocks.1.", "blocks.0.")]
        if name.endswith("timestep_embedder.linear_1.weight"):
            tensors[name].zero_()  # it reads sines, which either code rounds to float32
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    return module, model


def their_output(model, image, positions):
    model = copy.deepcopy(model).to(image.dtype)
    model.pos_embed.pos_embed.copy_(positions)  # of sines too
    return model(image, timestep=STEPS, class_labels=LABEL).sample[:, :3]


def our_output(model, image):
    model = copy.deepcopy(model).to(image.dtype)
    x, c = model.stem(image, STEPS, model.label_table(LABEL))
    return model.tail(run_layers(model.layers, x, c), c), model._positions()


def train_block(model, index):
    """A few steps of one block's adapters."""
    blocks = DiffusionBlocks(model, 2)
    random = torch.Generator().manual_seed(5)
    images = torch.randn(8, 3, 4, 4, generator=random).numpy()
    trainer = Trainer(
        blocks, ImageData(images, torch.arange(8) % 3, 3), steps=3, batch_size=4, lr=0.1
    )
    for _ in range(3):
        trainer.step_block(blocks[index])
    return blocks[index].layers


@torch.no_grad()
def in_their_code(layout, module, model, folder):
    """Their model with the adapters that their code has loaded."""
    if layout == "peft":
        peft = pytest.importorskip("peft")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    loaders = pytest.importorskip("diffusers.loaders.peft")

    class WithAdapters(module.DiTTransformer2DModel, loaders.PeftAdapterMixin):
        pass

    other = WithAdapters.from_config(model.config)
    other.load_state_dict(model.state_dict())
    with warnings.catch_warnings(action="error"):
        told = {"prefix": "transformer", "adapter_name": "ours", "use_safetensors": True}
        other.load_lora_adapter(folder, **told)
    return other.eval()


@pytest.mark.parametrize("targets", [SPLIT, ("qkv", "out")], ids=str)
@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_their_code_computes_with_a_blocks_adapters_what_the_fused_model_does(
    tmp_path, layout, targets
):
    pytest.importorskip("peft")
    module, original = their_model(tmp_path / "original")
    with warnings.catch_warnings(action="ignore"):
        model = load(tmp_path / "original")
    image = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    plain, _ = our_output(model, image)
    add_adapters(model, rank=2, alpha=3.0, targets=targets)
    layers = train_block(model, 1)
    save_adapters(model, tmp_path / "adapters", layout, layers=layers)
    theirs = in_their_code(layout, module, original, tmp_path / "adapters")
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-5), (F64, 1e-12)):
            found, positions = our_output(model, image.to(dtype))
            expected = their_output(theirs, image.to(dtype), positions)
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert (plain - found).abs().max() > 1e-2 * expected.abs().max()


def test_what_peft_has_saved_is_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    _, original = their_model(tmp_path / "original")
    with warnings.catch_warnings(action="ignore"):
        model = load(tmp_path / "original")
    targets = ["to_q", "to_v", "to_out.0", "ff.net.2"]
    settings = {
        "r": 2,
        "lora_alpha": 3,
        "alpha_pattern": {"attn1.to_v": 5},
        "target_modules": targets,
    }
    theirs = peft.get_peft_model(original, peft.LoraConfig(**settings))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "adapters")
    load_adapters(model, tmp_path / "adapters")
    assert {place.target for place, _ in adapters_in(model)} == {"q", "v", "out", "fc2"}
    assert {place.target: each.alpha for place, each in adapters_in(model)}["v"] == 5.0
    image = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, positions = our_output(model, image)
        expected = their_output(theirs, image, positions)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def changed(path, change=lambda tensors: None, **settings):
    """A file of adapters with some of it changed."""
    file, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


def add(name, *shape):
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def rename(part, other):
    def change(tensors):
        for name in list(tensors):
            tensors[name.replace(part, other)] = tensors.pop(name)

    return change


Q = "base_model.model.transformer_blocks.0.attn1.to_q.lora_"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: t.pop(f"{Q}A.weight"), {}, "0.attn1.to_q of .* must have lora_A and lora_B"),
        (add("x.lora_A.weight", 2, 2), {}, "^x.lora_A.weight of .* must be base_model.model.NAME"),
        (add(f"{Q}A.weight", 2, 15), {}, r"A and B of q of layers.0 must be .* got \(\(2, 15\), "),
        (add(f"{Q}A.weight", 2), {}, "to_q.lora_A.weight of .* a map"),
        (
            rename("blocks.0", "blocks.7"),
            {},
            r"blocks.7.attn1.to_q of .* of the DiT, got no such",
        ),
        (rename("transformer_", "other_"), {}, "must be of one of layers, blocks, transformer_bl"),
        (lambda t: t.clear(), {}, "must have adapters, got none"),
        (len, {"use_rslora": True}, "use_rslora of .* must be False, got True"),
        (len, {"bias": "all"}, "bias of .* must be none, got all"),
        (len, {"lora_alpha": -1}, "alpha must be a finite number above 0, got -1.0"),
    ],
)
def test_rejects_a_file_that_is_not_for_the_model(tmp_path, change, settings, message):
    model = make(("q",))
    save_adapters(model, tmp_path, "peft")
    changed(tmp_path, change, **settings)
    other = without(model)
    with pytest.raises(ValueError, match=message):
        load_adapters(other, tmp_path)
    assert not list(adapters_in(other))


def test_rejects_files_that_overlap_or_disagree(tmp_path):
    save_adapters(make(), tmp_path / "a", "peft", layers=[0])
    for name, layers, layout, options in (
        ("same", [0, 1], "peft", {}),
        ("layout", [1], "diffusers", {}),
        ("base", [1], "peft", {"base": "another"}),
        ("names", [1], "peft", {"names": "dit"}),
    ):
        save_adapters(make(), tmp_path / name, layout, layers=layers, **options)
    for name, message in {
        "same": "must have no adapter of transformer_blocks.0.attn1.to_k, which .* has too",
        "layout": "layout of .* must be peft as of .*, got diffusers",
        "base": "base of .* must be  as of .*, got another",
        "names": "names of .* must be diffusers as of .*, got dit",
        "a": "paths must name each file once",
        "nothing": "must have one of adapter_model.safetensors or .*, got none",
    }.items():
        with pytest.raises(ValueError, match=message):
            merge_adapter_files([tmp_path / "a", tmp_path / name], tmp_path / "all")
    with pytest.raises(ValueError, match="paths must be at least one file of adapters, got none"):
        merge_adapter_files([], tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("kohya", {}, "layout must be one of peft, diffusers, got kohya"),
        ("peft", {"names": "flux"}, "names must be one of own, dit, diffusers, got flux"),
        ("peft", {"layers": [2]}, "layers must be 0 to 1, got 2"),
        ("peft", {"layers": [1]}, "model must have adapters in layers 1, got none"),
    ],
)
def test_rejects(tmp_path, layout, options, message):
    with pytest.raises(ValueError, match=message):
        save_adapters(make(layers=[0]), tmp_path / "adapters", layout, **options)
    assert not (tmp_path / "adapters").exists()
