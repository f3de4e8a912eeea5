"""Whole models of the real libraries, fused: what they give, and what their own code saves."""

import pytest
import torch
from convert.fused_cases import EXTRA
from models.tiny import randomise
from safetensors.torch import load_file

from dbkernels.convert import fuse, unfuse


def real(module, name):
    library = module.partition(".")[0]
    return getattr(pytest.importorskip(module, reason=f"{library} {EXTRA}"), name)


def dit():
    kind = real("diffusers.models.transformers.dit_transformer_2d", "DiTTransformer2DModel")
    model = kind(2, 6, in_channels=3, num_layers=2, sample_size=4, num_embeds_ada_norm=10)
    step, label = torch.tensor([3, 7]), torch.tensor([1, 0])
    return model, {
        "hidden_states": torch.randn(2, 3, 4, 4),
        "timestep": step,
        "class_labels": label,
    }


def vit():
    kind = real("timm.models.vision_transformer", "VisionTransformer")
    model = kind(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5)
    return model, {"x": torch.randn(2, 3, 8, 8)}


def answer(model, given):
    torch.manual_seed(2)  # a DiT drops labels
    result = model(**given)
    return getattr(result, "sample", result)


@pytest.mark.parametrize(("made", "layers"), [(dit, "transformer_blocks"), (vit, "blocks")])
def test_a_real_model_answers_learns_and_is_saved_as_before(made, layers, tmp_path):
    torch.manual_seed(0)
    model, given = made()
    randomise(model.double(), 0.1)
    given = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    expected = answer(model, given)
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.zero_grad()

    report = fuse(model, "qkv")
    assert [each.path for each in report.replaced] == [f"{layers}.0", f"{layers}.1"]
    result = answer(model, given)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)
    result.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-9, atol=1e-9)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path)
        again = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    else:
        torch.save(model.state_dict(), tmp_path / "vit.pth")
        again = torch.load(tmp_path / "vit.pth")
    assert again.keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in again.items())
    unfuse(model)
    assert torch.equal(answer(model, given), expected)
