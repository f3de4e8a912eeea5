"""Whole networks of other people's files: they compute the same, and come back with their bits."""

import json
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from convert import their_networks as their
from convert.their_networks import write
from safetensors.torch import load_file

from dbkernels.convert import load, save_as
from dbkernels.diffusion.samplers import euler
from dbkernels.diffusion.timesteps import Timesteps
from dbkernels.models import DiT, ViT
from dbkernels.models.layer import run_layers
from dbkernels.training.diffusion_blocks import DiffusionBlocks

HEADS = {"num_heads": their.HEADS}
STEPS = torch.tensor([0, 500, 999])
LABEL = torch.tensor([4, their.CLASSES, 1])
FREQUENCIES = "sinusoid of a step with .* frequencies"


def noise(seed=1, dtype=torch.float32):
    shape = 3, their.CHANNELS, their.SIZE, their.SIZE
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(dtype)


def given(path):
    return HEADS if path.suffix else {}


def loaded(path, **options):
    with warnings.catch_warnings(action="ignore"):
        return load(path, **options)


def written(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix:
        return torch.load(path, weights_only=True)
    return load_file(path / "transformer" / "diffusion_pytorch_model.safetensors")


def network(model, image, t, label):
    """The raw output of a DiT."""
    x, c = model.stem(image, t, model.label_table(label))
    return model.tail(run_layers(model.layers, x, c), c)


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


dit_files = pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors", "folder"])


def of_their_code(name):
    """What diffusers computes otherwise."""
    return {} if "." in name else {"gaps": 127, "eps2": 0.1}


@dit_files
@pytest.mark.parametrize("variance", [True, False])
def test_a_dit_predicts_the_noise_that_the_original_does(tmp_path, name, variance):
    tensors = their.dit_tensors(variance)
    path = write(tensors, tmp_path / name)
    with pytest.warns(UserWarning, match="left out") if variance else nullcontext():
        model = load(path, **given(path))
    exact = {key: tensor.double() for key, tensor in tensors.items()}
    own = of_their_code(name)
    expected, eager = (
        their.dit_output(each, noise(dtype=dtype), STEPS, LABEL, **own)[:, : their.CHANNELS]
        for each, dtype in ((exact, torch.float64), (tensors, torch.float32))
    )
    actual = network(model, noise(), STEPS, LABEL)
    error, allowed = ((each - expected).abs().max() for each in (actual, eager))
    assert error <= 2 * allowed


def test_a_folder_that_says_no_eps_has_that_of_diffusers(tmp_path):
    path = write(their.dit_tensors(), tmp_path / "folder") / "transformer" / "config.json"
    settings = {name: value for name, value in their.SETTINGS.items() if name != "norm_eps"}
    path.write_text(json.dumps(settings))
    assert loaded(tmp_path / "folder").config.eps2 == 1e-5


@dit_files
def test_a_sampler_draws_the_same_images_with_a_dit_as_one_block(tmp_path, name):
    tensors = their.dit_tensors()
    path = write(tensors, tmp_path / name)
    model, own = loaded(path, **given(path)), of_their_code(name)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()

    expected = noise()
    for step, after in ((999, 700), (700, 400), (400, 100), (100, None)):
        t = torch.full((3,), step)
        F = their.dit_output(tensors, expected, t, LABEL, **own)[:, : their.CHANNELS]
        clean = (expected - (1 - kept[step]).sqrt() * F) / kept[step].sqrt()
        left = torch.tensor(1.0) if after is None else kept[after]
        expected = left.sqrt() * clean + (1 - left).sqrt() * F

    blocks = DiffusionBlocks(model, 1, process=Timesteps())
    with torch.no_grad():
        denoiser = blocks.denoiser({"label": LABEL})
        actual = euler(denoiser, noise(), [999.0, 700.0, 400.0, 100.0], blocks.process.path)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@dit_files
@pytest.mark.parametrize("variance", [True, False])
def test_a_dit_comes_back_with_its_bits(tmp_path, name, variance):
    first = write(their.dit_tensors(variance), tmp_path / name)
    second = tmp_path / f"again {name}"
    model = loaded(first, **given(first))
    save_as(model, second, "dit" if first.suffix else "diffusers", original=first)
    assert_same_bits(written(second), written(first))
    again = loaded(second, **given(second))
    assert again.config == model.config
    assert_same_bits(again.state_dict(), model.state_dict())


def test_a_dit_goes_to_diffusers_and_back_with_its_bits(tmp_path):
    tensors = their.dit_tensors()
    first = write(tensors, tmp_path / "dit.pt")
    with pytest.warns(UserWarning, match=FREQUENCIES):
        save_as(loaded(first, **HEADS), tmp_path / "folder", "diffusers", original=first)
    assert_same_bits(written(tmp_path / "folder"), their.to_diffusers(tensors))
    model = loaded(tmp_path / "folder")
    with pytest.warns(UserWarning, match=FREQUENCIES):
        save_as(model, tmp_path / "back.safetensors", "dit", original=first)
    assert_same_bits(written(tmp_path / "back.safetensors"), tensors)


def test_a_trained_dit_keeps_the_variance_of_its_original_alone(tmp_path):
    tensors = their.dit_tensors()
    first = write(tensors, tmp_path / "dit.pt")
    model = loaded(first, **HEADS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save_as(model, tmp_path / "trained.pt", "dit", original=first)
    expected = {name: 2 * tensor for name, tensor in tensors.items()}
    expected["pos_embed"] = tensors["pos_embed"]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        both = expected[name].view(-1, 2, their.CHANNELS, *expected[name].shape[1:])
        both[:, 1] /= 2
    assert_same_bits(written(tmp_path / "trained.pt"), expected)


def test_without_an_original_a_dit_predicts_no_variance(tmp_path):
    tensors = their.dit_tensors()
    model = loaded(write(tensors, tmp_path / "dit.pt"), **HEADS)
    save_as(model, tmp_path / "alone.pt", "dit")
    found = written(tmp_path / "alone.pt")
    torch.testing.assert_close(found["pos_embed"], tensors["pos_embed"], rtol=0, atol=1e-6)
    expected = their.dit_output(tensors, noise(), STEPS, LABEL)[:, : their.CHANNELS]
    assert_same_bits(
        {"": their.dit_output(found | {"pos_embed": tensors["pos_embed"]}, noise(), STEPS, LABEL)},
        {"": expected},
    )


@pytest.mark.parametrize("keys", [("ema", "model"), ("state_dict_ema", "state_dict")])
def test_the_moving_average_is_taken_unless_it_is_not_wanted(tmp_path, keys):
    groups = {key: their.dit_tensors(seed=seed) for seed, key in enumerate(keys)}
    path = tmp_path / "both.pt"
    torch.save({**groups, "step": 7}, path)
    for key, ema in zip(keys, (True, False), strict=True):
        found = loaded(path, ema=ema, **HEADS).label_table.weight
        assert torch.equal(found, groups[key]["y_embedder.embedding_table.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_has_the_dtype_of_its_file_and_memory_of_its_own(tmp_path, dtype):
    shared = torch.ones(their.D, dtype=dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in their.dit_tensors().items()}
    names = ("blocks.0.attn.proj.bias", "blocks.1.attn.proj.bias")
    path = write(tensors | dict.fromkeys(names, shared), tmp_path / "dit.pt")
    parameters = list(loaded(path, **HEADS).parameters())
    assert {p.dtype for p in parameters} == {dtype} and all(p.requires_grad for p in parameters)
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


def test_a_file_of_a_published_size_says_its_heads(tmp_path):
    model = DiT(replace(DiT.preset("digits"), process="vp", prediction="epsilon"))
    save_as(model, tmp_path / "digits.safetensors", "dit")
    assert load(tmp_path / "digits.safetensors").config == model.config
    again = load(tmp_path / "digits.safetensors", recompute="layer", image_size=8)
    assert again.config == replace(model.config, recompute="layer")


def answers(model, image):
    level = torch.full((len(image),), 80.0)
    everything = range(model.config.depth)
    z = torch.zeros(len(image), model.config.dim)
    return model.denoise(z, level, everything, {"image": image})


@pytest.mark.parametrize("scales", [False, True])
def test_a_vit_answers_as_timms_and_comes_back_with_its_bits(tmp_path, scales):
    tensors = their.vit_tensors(scales)
    first = write(tensors, tmp_path / "vit.pth")
    model = load(first, **HEADS)
    assert isinstance(model, ViT)
    expected = their.vit_logits(tensors, noise())
    assert (answers(model, noise()) - expected).abs().max() <= 5e-5 * expected.abs().max()
    save_as(model, tmp_path / "vit.safetensors", "timm", original=first)
    assert_same_bits(written(tmp_path / "vit.safetensors"), tensors)
    save_as(model, tmp_path / "alone.bin", "timm")
    found = their.vit_logits(written(tmp_path / "alone.bin"), noise())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_noise_of_a_loaded_vit_gets_an_effect_by_training(tmp_path):
    model = load(write(their.vit_tensors(), tmp_path / "vit.pth"), **HEADS)
    answers(model, noise()).square().sum().backward()
    assert model.layers[0].modulation.weight.grad.count_nonzero()
    assert model.label_table.weight.norm(dim=-1).min() > 0


def test_a_trained_class_token_is_written_as_the_sum_that_it_is(tmp_path):
    first = write(their.vit_tensors(), tmp_path / "vit.pth")
    model = load(first, **HEADS)
    with torch.no_grad():
        model.positions.add_(1)
    save_as(model, tmp_path / "trained.pth", "timm", original=first)
    found = written(tmp_path / "trained.pth")
    assert torch.equal(found["cls_token"][0, 0], model.positions[0])
    assert torch.equal(
        found["pos_embed"][0], torch.cat([torch.zeros(1, their.D), model.positions[1:]])
    )


def test_the_real_diffusers_loads_what_is_written_and_computes_the_same(tmp_path):
    reason = "diffusers is not installed: pip install 'dbkernels[convert]'"
    theirs = pytest.importorskip("diffusers", reason=reason).DiTTransformer2DModel
    original = theirs.from_config(their.SETTINGS).eval()
    path = write(their.dit_tensors(), tmp_path / "made")
    original.load_state_dict(written(path))
    original.save_pretrained(tmp_path / "folder" / "transformer")
    model = loaded(tmp_path / "folder")
    with torch.no_grad():
        expected = original(noise(), STEPS, LABEL).sample
        actual = network(model, noise(), STEPS, LABEL)
        scale = expected.abs().max()
        assert (actual - expected[:, : their.CHANNELS]).abs().max() <= 1e-4 * scale
        save_as(model, tmp_path / "again", "diffusers", original=tmp_path / "folder")
        again = theirs.from_pretrained(tmp_path / "again" / "transformer").eval()
        assert torch.equal(again(noise(), STEPS, LABEL).sample, expected)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_real_timm_loads_what_is_written_and_computes_the_same(tmp_path, scale):
    reason = "timm is not installed: pip install 'dbkernels[convert]'"
    vit = pytest.importorskip("timm.models.vision_transformer", reason=reason).VisionTransformer
    sizes = {"img_size": their.SIZE, "patch_size": their.PATCH, "in_chans": their.CHANNELS}
    sizes |= {"num_classes": their.CLASSES, "embed_dim": their.D, "depth": their.DEPTH}
    original, again = (vit(**sizes, **HEADS, init_values=scale).eval() for _ in range(2))
    path = tmp_path / "vit.safetensors"
    original.load_state_dict(their.vit_tensors(scale is not None))
    model = load(write(original.state_dict(), path), **HEADS)
    expected = original(noise())
    assert (answers(model, noise()) - expected).abs().max() <= 5e-5 * expected.abs().max()
    save_as(model, tmp_path / "again.safetensors", "timm", original=path)
    again.load_state_dict(written(tmp_path / "again.safetensors"))
    assert torch.equal(again(noise()), expected)
