"""A network to start from: somebody else's file or folder, or a run."""

import warnings
from dataclasses import replace

import pytest
import torch
from convert import their_networks as their
from convert.their_networks import write

from dbkernels.convert import load, open_trained, save_as
from dbkernels.models.registry import family_named
from dbkernels.models.start import take_over


@pytest.mark.parametrize("kind", ["dit.safetensors", "vit.pt", "folder"])
def test_a_published_network_is_what_blocks_begin_with(tmp_path, kind):
    family = "vit" if kind.startswith("vit") else "dit"
    made = {"dit": lambda: their.dit_tensors(variance=False), "vit": their.vit_tensors}[family]()
    path = write(made, tmp_path / (kind if "." in kind else "dit.pt"))
    torch.manual_seed(0)
    model = load(path, num_heads=their.HEADS)
    torch.manual_seed(1)
    heads = {"num_heads": their.HEADS}
    if kind == "folder":
        with warnings.catch_warnings(action="ignore"):  # frequencies and eps2 differ there
            save_as(model, path := tmp_path / kind, "diffusers")
        model, heads = load(path), {"num_heads": 1}  # the folder says it
    trained = open_trained(path, **heads)
    assert (trained.family, trained.config) == (family, model.config)
    assert not trained.without_noise and trained.where == str(path)
    entry = family_named(family)
    new = entry.model(replace(model.config, recompute="layer"))
    take_over(new, trained, entry.start, without_noise=False)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in new.state_dict().items())


def test_digests_tell_weights_apart(tmp_path):
    first, again, other = (
        open_trained(write(tensors, tmp_path / f"{n}.pt"), num_heads=their.HEADS).digest
        for n, tensors in enumerate(their.dit_tensors(False, seed) for seed in (0, 0, 1))
    )
    assert first == again != other and len(first) == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.pt", "none.pt must be a file, got none"),
        ("none", "must hold config.json, got none in"),
        ("empty", "config.json must be a file of JSON"),
    ],
)
def test_rejects(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        open_trained(tmp_path / name)
