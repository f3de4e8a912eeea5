"""Files of something else are refused by what is wrong in them, and no model is made."""

import json
import warnings
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from convert import their_networks as their
from convert.their_networks import write
from safetensors.torch import load_file, save_file

from dbkernels.convert import load, save_as
from dbkernels.models import DiT

HEADS = {"num_heads": their.HEADS}
ones = torch.ones


def loaded(path, **options):
    with warnings.catch_warnings(action="ignore"):
        return load(path, **HEADS, **options)


TABLE = "y_embedder.embedding_table.weight"
WRONG_DIT = [
    ("blocks.1.attn.proj.bias", None, r"\(24,\), got no such tensor"),
    ("blocks.1.mlp.fc2.bias", ones(3), r"\(24,\), got \(3,\)"),
    ("blocks.0.mlp.fc1.weight", None, r"\(hidden, D\), got no such tensor"),
    ("blocks.0.mlp.fc1.weight", ones(50, 24), "a multiple of 24 rows, got 50"),
    ("x_embedder.proj.weight", ones(24, 3), r"\(D, C, patch, patch\), got \(24, 3\)"),
    ("x_embedder.proj.weight", ones(24, 0, 2, 2), r"got \(24, 0, 2, 2\)"),
    ("final_layer.linear.bias", ones(12), r"\(24,\), got \(12,\)"),
    (TABLE, ones(1, 24), "a row for each class and one for none, got 1"),
    (TABLE, ones(6, 24).half(), "torch.float32 as pos_embed is, got torch.float16"),
    (TABLE, ones(6, 24).long(), "of floating point"),
    ("blocks.1.ls1.gamma", ones(3), r"not be there, got one of \(3,\)"),
    ("blocks.3.mlp.fc1.bias", ones(3), "not be there"),
    ("layers.0.mlp.fc1.bias", ones(3), "not be there"),
    ("pos_embed", 1.001 * their.grid_table(), "the published sines and cosines"),
    ("pos_embed", their.grid_table() + torch.nan, "the published sines and cosines"),
    ("pos_embed", ones(1, 8, 24), r"\(1, 4, 24\), got \(1, 8, 24\)"),
]
WRONG_VIT = [
    ("head.weight", None, r"\(classes, D\), got no such tensor"),
    ("pos_embed", None, r"\(1, T \+ 1, D\), got no such tensor"),
    ("blocks.1.norm2.bias", None, r"\(24,\), got no such tensor"),
    ("fc_norm.weight", ones(24), "not be there"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), WRONG_DIT + WRONG_VIT)
def test_a_tensor_that_is_missing_or_wrong_is_named(tmp_path, name, tensor, message, request):
    whole = their.vit_tensors() if (name, tensor, message) in WRONG_VIT else their.dit_tensors()
    tensors = {**whole, name: tensor} if tensor is not None else whole
    if tensor is None:
        del tensors[name]
    with pytest.raises(ValueError, match=f"{name} of .* must .*{message}"):
        loaded(write(tensors, tmp_path / "wrong.pt"))


def test_scales_of_half_the_branches_are_refused(tmp_path):
    tensors = their.vit_tensors() | {"blocks.0.ls1.gamma": ones(their.D)}
    with pytest.raises(ValueError, match=r"blocks.0.ls2.gamma of .* got no such"):
        loaded(write(tensors, tmp_path / "vit.pt"))


def cut(directory):
    path = write(their.dit_tensors(), directory / "dit.pt")
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def of_bytes(name, data):
    return lambda directory: ((directory / name).write_bytes(data), directory / name)[1]


def of(make, name="wrong.pt"):
    return lambda directory: write(make(), directory / name)


WRONG_FILES = [
    (lambda directory: directory / "none.pt", "none.pt must be a file, got none"),
    (of_bytes("dit.ckpt", b""), "must end in .pt, .pth, .bin or .safetensors"),
    (of_bytes("dit.pt", b""), "must be a whole file of torch.save, got"),
    (of_bytes("dit.pt", b"x" * 99), "dit.pt must"),
    (of_bytes("dit.safetensors", b"x" * 99), "must be a whole safetensors file, got"),
    (cut, "must be a whole file of torch.save, got"),
    (of(lambda: {"args": Namespace()}), "nothing is unpickled here, got .*argparse.Namespace"),
    (of(lambda: {"a": 3}), "must hold tensors by name, got 'a', a int"),
    (of(lambda: {}), "must hold tensors by name, got none"),
    (of(lambda: [1]), "must hold tensors by name, got '', a list"),
    (of(lambda: {"a": ones(2)}), "of one DiT or ViT, with one of .*, got a and others"),
    (of(lambda: their.dit_tensors() | their.vit_tensors()), "of one DiT or ViT"),
    (of(lambda: their.to_diffusers(their.dit_tensors())), "must be given as the folder"),
]


@pytest.mark.parametrize(("file", "message"), WRONG_FILES)
def test_a_file_that_holds_no_network_is_refused(tmp_path, file, message):
    with pytest.raises(ValueError, match=message):
        loaded(file(tmp_path))


WRONG_OPTIONS = [
    ({"image_size": 8}, "image_size must be 6 for .*, got 8"),
    ({"num_heads": None}, "num_heads must be given for .* is 24 wide and 2 deep"),
    ({"num_heads": 5}, "dim must be a multiple of num_heads, got 24 and 5"),
    ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ({"recompute": "all"}, "recompute must be one of .*, got all"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
@pytest.mark.parametrize("make", [their.dit_tensors, their.vit_tensors])
def test_what_is_said_beside_the_file_must_fit(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        load(write(make(), tmp_path / "file.pt"), **HEADS | options)


def test_a_file_without_positions_has_a_size_that_is_given(tmp_path):
    tensors = their.dit_tensors()
    del tensors["pos_embed"]
    path = write(tensors, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"image_size must be given for .* has no pos_embed"):
        loaded(path)
    assert loaded(path, image_size=8).config.image_size == 8


WRONG_SETTINGS = [
    ({"_class_name": "UNet"}, "_class_name of .* must be one of DiT.*, got UNet"),
    ({"norm_type": "ada_norm"}, "norm_type of .* must be ada_norm_zero, got ada_norm"),
    ({"dropout": 0.1}, "dropout of .* must be 0.0, got 0.1"),
    ({"num_layers": 3}, r"transformer_blocks.2.* of .* got no such tensor"),
    ({"num_layers": 1}, r"transformer_blocks.1.* of .* must not be there"),
    ({"num_layers": "3"}, "num_layers of .* must be a whole number, got '3'"),
    ({"patch_size": 0}, "patch_size of .* must be at least 1, got 0"),
    ({"norm_eps": 0}, "norm_eps of .* must be between 0 and 1, got 0"),
    ({"out_channels": 5}, "out_channels of .* must be 3, or 6 with a variance, got 5"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS)
def test_a_folder_that_says_another_network_is_refused(tmp_path, settings, message):
    write(their.dit_tensors(), tmp_path)
    said = json.dumps(their.SETTINGS | settings)
    (tmp_path / "transformer" / "config.json").write_text(said)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    write(their.dit_tensors(), tmp_path)
    with pytest.raises(ValueError, match=r"num_heads must be None for .* says it, got 3"):
        load(tmp_path, **HEADS)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    copy = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    save_file(tensors | {copy: tensors[copy] + 1}, weights)
    with pytest.raises(ValueError, match=f"{copy} of .* must be equal to transformer_blocks.0"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors must be a file"):
        load(tmp_path)
    (weights.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be a file of JSON"):
        load(tmp_path)


WRONG_MODELS = [
    ("dit", {"process": "flow", "prediction": "velocity"}, "process must be vp for dit, got flow"),
    ("diffusers", {"prediction": "v"}, "prediction must be epsilon for diffusers, got v"),
    ("dit", {"positions": "cos_sin"}, "positions must be sin_cos for dit, got cos_sin"),
    ("diffusers", {"mlp_ratio": 3}, "mlp_ratio must be 4 for diffusers, got 3"),
    ("timm", {}, "model must be a ViT for timm, got a DiT"),
    ("flax", {}, "layout must be one of dit, diffusers, timm, got flax"),
]


@pytest.mark.parametrize(("layout", "options", "message"), WRONG_MODELS)
def test_a_network_that_their_code_cannot_be_is_not_written(tmp_path, layout, options, message):
    of_dit = {"process": "vp", "prediction": "epsilon", **options}
    model = DiT(replace(DiT.preset("digits"), depth=1, **of_dit))
    with pytest.raises(ValueError, match=message):
        save_as(model, tmp_path / "new.pt", layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["layers.1.modulation.weight", "modulation.linear.bias"])
def test_a_vit_with_a_condition_is_not_written(tmp_path, name):
    model = loaded(write(their.vit_tensors(), tmp_path / "vit.pth"))
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    with pytest.raises(ValueError, match=f"{name}.* must .*for timm"):
        save_as(model, tmp_path / "new.pt", "timm")


def test_an_original_of_another_network_is_refused(tmp_path):
    model = loaded(write(their.dit_tensors(), tmp_path / "dit.pt"))
    vit = write(their.vit_tensors(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="must hold a DiT, as the model is"):
        save_as(model, tmp_path / "new.pt", "dit", original=vit)
    other = DiT(replace(model.config, depth=1))
    with pytest.raises(ValueError, match=r"blocks.1.* of .* must not be there"):
        save_as(other, tmp_path / "new.pt", "dit", original=tmp_path / "dit.pt")
    assert not (tmp_path / "new.pt").exists()
