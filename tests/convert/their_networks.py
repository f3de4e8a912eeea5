"""A published DiT and a timm ViT said anew, as functions of their files' tensors.

Peebles & Xie 2023 (arXiv:2212.09748) with the schedule of Ho et al. 2020 (arXiv:2006.11239), and
Dosovitskiy et al. 2020 (arXiv:2010.11929). All is computed in the dtype of the tensors.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

D, HEADS, DEPTH, PATCH, CHANNELS, SIZE, CLASSES = 24, 3, 2, 2, 3, 6, 5
HIDDEN = 4 * D


def filled(shapes, seed=0):
    """Numbers of which no part of a network is at rest."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        numbers = torch.randn(shape, generator=random)
        tensors[name] = numbers * 0.4 if numbers.dim() < 2 else numbers * shape[-1] ** -0.5
    return tensors


def linear_shapes(**sizes):
    found = {f"{name}.weight": size for name, size in sizes.items()}
    return found | {f"{name}.bias": size[:1] for name, size in sizes.items()}


def layer_shapes(index):
    sizes = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (HIDDEN, D)}
    sizes |= {"mlp.fc2": (D, HIDDEN)}
    return {f"blocks.{index}.{name}": size for name, size in sizes.items()}


def grid_table():
    """Positions as they are published: of each axis, column then row, sines and then cosines."""
    side, quarter = SIZE // PATCH, D // 4
    rates = 10000.0 ** -(torch.arange(quarter).double() / quarter)
    rows = []
    for row in range(side):
        for column in range(side):
            angles = [place * rates for place in (column, row)]
            rows.append(torch.cat([part for a in angles for part in (a.sin(), a.cos())]))
    return torch.stack(rows).float()[None]


def dit_tensors(variance=True, seed=0):
    """As a file of facebookresearch/DiT has them."""
    out = PATCH**2 * CHANNELS * (2 if variance else 1)
    sizes = {"x_embedder.proj": (D, CHANNELS, PATCH, PATCH)}
    sizes |= {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    for index in range(DEPTH):
        sizes |= layer_shapes(index) | {f"blocks.{index}.adaLN_modulation.1": (6 * D, D)}
    sizes |= {"final_layer.linear": (out, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    shapes = linear_shapes(**sizes) | {"y_embedder.embedding_table.weight": (CLASSES + 1, D)}
    return {"pos_embed": grid_table(), **filled(shapes, seed)}


def vit_tensors(scales=False):
    """As timm names them."""
    sizes = {"patch_embed.proj": (D, CHANNELS, PATCH, PATCH), "norm": (D,), "head": (CLASSES, D)}
    for index in range(DEPTH):
        sizes |= layer_shapes(index) | {f"blocks.{index}.norm{i}": (D,) for i in (1, 2)}
    shapes = linear_shapes(**sizes) | {"cls_token": (1, 1, D)}
    shapes["pos_embed"] = (1, (SIZE // PATCH) ** 2 + 1, D)
    if scales:
        shapes |= {f"blocks.{i}.ls{j}.gamma": (D,) for i in range(DEPTH) for j in (1, 2)}
    return filled(shapes)


class Tensors:
    """Of one part of a network, by what stands behind its name."""

    def __init__(self, tensors, prefix=""):
        self.tensors, self.prefix = tensors, prefix

    def __call__(self, name, x):
        weight, bias = (self.tensors[f"{self.prefix}{name}.{kind}"] for kind in ("weight", "bias"))
        if weight.dim() == 4:
            return F.conv2d(x, weight, bias, stride=PATCH).flatten(2).mT
        return F.linear(x, weight, bias) if weight.dim() == 2 else (weight, bias)

    def inside(self, name):
        return Tensors(self.tensors, f"{self.prefix}{name}.")


def attend(part, x):
    B, T, _ = x.shape
    q, k, v = part("attn.qkv", x).reshape(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return part("attn.proj", (weights @ v).transpose(1, 2).reshape(B, T, -1))


def feed(part, x, approximate):
    return part("mlp.fc2", F.gelu(part("mlp.fc1", x), approximate=approximate))


def modulated(x, shift, scale, eps):
    return F.layer_norm(x, (D,), eps=eps) * (1 + scale[:, None]) + shift[:, None]


def dit_output(tensors, image, t, label, gaps=128, eps2=1e-6):
    """All channels of a DiT, (B, C or 2 C, H, W), at the steps t (B,)."""
    part, dtype = Tensors(tensors), image.dtype
    rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=dtype) / gaps)
    angles = t[:, None].to(dtype) * rates
    embedded = part("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=-1))
    c = part("t_embedder.mlp.2", F.silu(embedded))
    c = F.silu(c + tensors["y_embedder.embedding_table.weight"][label])
    x = part("x_embedder.proj", image) + tensors["pos_embed"]
    for index in range(DEPTH):
        layer = part.inside(f"blocks.{index}")
        shift1, scale1, gate1, shift2, scale2, gate2 = layer("adaLN_modulation.1", c).chunk(6, 1)
        x = x + gate1[:, None] * attend(layer, modulated(x, shift1, scale1, 1e-6))
        x = x + gate2[:, None] * feed(layer, modulated(x, shift2, scale2, eps2), "tanh")
    shift, scale = part("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    rows = part("final_layer.linear", modulated(x, shift, scale, 1e-6))
    side, B, numbers = SIZE // PATCH, len(rows), rows.shape[-1]
    grid = rows.reshape(B, side, side, PATCH, PATCH, numbers // PATCH**2)
    return torch.einsum("bhwpqc->bchpwq", grid).reshape(B, -1, SIZE, SIZE)


def vit_logits(tensors, image):
    """Of a ViT's class token, (B, classes)."""
    part = Tensors(tensors)
    x = part("patch_embed.proj", image)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], 1) + tensors["pos_embed"]
    for index in range(DEPTH):
        layer = part.inside(f"blocks.{index}")
        for number, branch in ((1, attend), (2, lambda part, x: feed(part, x, "none"))):
            y = branch(layer, F.layer_norm(x, (D,), *layer(f"norm{number}", x), eps=1e-6))
            x = x + y * tensors.get(f"blocks.{index}.ls{number}.gamma", 1)
    return part("head", F.layer_norm(x[:, 0], (D,), *part("norm", x), eps=1e-6))


def to_diffusers(tensors):
    """A DiT's tensors by diffusers' names."""
    found = {}
    for kind in ("weight", "bias"):
        for index in range(DEPTH):
            ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
            emb = f"{theirs}.norm1.emb"
            parts = tensors[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                found[f"{theirs}.attn1.to_{name}.{kind}"] = part.clone()
            renamed = {"attn.proj": "attn1.to_out.0", "adaLN_modulation.1": "norm1.linear"}
            renamed |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
            for name, new in renamed.items():
                found[f"{theirs}.{new}.{kind}"] = tensors[f"{ours}.{name}.{kind}"]
            for name, new in {"0": "linear_1", "2": "linear_2"}.items():
                copied = tensors[f"t_embedder.mlp.{name}.{kind}"].clone()
                found[f"{emb}.timestep_embedder.{new}.{kind}"] = copied
            table = tensors["y_embedder.embedding_table.weight"].clone()
            found[f"{emb}.class_embedder.embedding_table.weight"] = table
        for ours, theirs in {
            "x_embedder.proj": "pos_embed.proj",
            "final_layer.adaLN_modulation.1": "proj_out_1",
            "final_layer.linear": "proj_out_2",
        }.items():
            found[f"{theirs}.{kind}"] = tensors[f"{ours}.{kind}"]
    return found


SETTINGS = {
    "_class_name": "DiTTransformer2DModel", "num_attention_heads": HEADS,
    "attention_head_dim": D // HEADS, "in_channels": CHANNELS, "out_channels": 2 * CHANNELS,
    "num_layers": DEPTH, "sample_size": SIZE, "patch_size": PATCH, "num_embeds_ada_norm": CLASSES,
    "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_eps": 0.1,
}  # fmt: skip


def write(tensors, path):
    """As a file of their code, or a folder."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix:
        torch.save(tensors, path)
    else:
        folder = path / "transformer"
        folder.mkdir(parents=True, exist_ok=True)
        channels = len(tensors["final_layer.linear.bias"]) // PATCH**2
        settings = SETTINGS | {"out_channels": channels}
        (folder / "config.json").write_text(json.dumps(settings))
        save_file(to_diffusers(tensors), folder / "diffusion_pytorch_model.safetensors")
    return path
