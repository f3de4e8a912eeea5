"""What may be other in a DiT block, and the part that is named where no layer has it."""

from functools import partial

import torch
from convert import published
from convert.published import COND, D, H
from torch import nn
from torch.nn.utils import parametrizations


def put(name, make):
    """Changes a block's part."""
    return lambda block: block.set_submodule(name, make(), strict=True)


def both(first, second, make):
    def change(block):
        for name in (first, second):
            block.set_submodule(name, make(), strict=True)

    return change


def of_class(kind):
    return lambda block: setattr(block, "__class__", kind)


def attention(kind):
    return lambda block: setattr(block, "attn", kind())


def set_in(name, **values):
    def change(block):
        module = block.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, value)

    return change


def functional(kind):
    def change(block):
        del block.norm1, block.norm2, block.mlp.act
        block.__class__ = kind

    return change


def drops(*names):
    def change(block):
        for name in names:
            block.get_submodule(name).p = 0.4

    return change


def drops_in(kind, *names):
    """An attention of its own, and a share of what these names say."""

    def change(block):
        block.attn = kind()
        drops(*names)(block)

    return change


rms = partial(nn.RMSNorm, D // H)
norms = partial(both, "norm1", "norm2")
qk = partial(both, "attn.q_norm", "attn.k_norm")
same_scale = (D // 2) ** -0.5
# by what it changes: the change, and the part that is named where no layer has it
VARIATIONS = {
    "as published": (lambda block: None, None),
    "rms of q and k": (qk(partial(rms, eps=1e-6)), None),
    "other heads": (set_in("attn", num_heads=2, scale=same_scale), None),
    "other eps": (norms(partial(nn.LayerNorm, D, 1e-3, False)), None),
    "affine norms": (norms(partial(nn.LayerNorm, D, 1e-6)), None),
    "rms norms": (norms(partial(nn.RMSNorm, D, 1e-5, False)), None),
    "affine rms norms": (norms(partial(nn.RMSNorm, D, 1e-5)), None),
    "gated": (put("mlp", published.Gated), None),
    "eps of one norm": (put("norm2", partial(nn.LayerNorm, D, 1e-3, False)), None),
    "rms of q and k, other eps": (qk(partial(rms, eps=1e-2)), None),
    "no bias of qkv": (set_in("attn.qkv", bias=None), None),
    "no bias of proj": (set_in("attn.proj", bias=None), None),
    "no bias of fc1": (set_in("mlp.fc1", bias=None), None),
    "no bias of fc2": (set_in("mlp.fc2", bias=None), None),
    "wide heads": (put("attn", partial(published.Attention, width=8 * H)), None),
    "attention dropout": (set_in("attn.attn_drop", p=0.3), None),
    "dropout of both branches": (drops("attn.proj_drop", "mlp.drop2"), None),
    "dropout that is asked for": (drops_in(published.Asks, "attn.attn_drop"), None),
    "functions": (functional(published.Functional), None),
    "idle drop path": (lambda block: block.add_module("drop_path1", nn.Identity()), None),
    "exact gelu": (put("mlp.act", nn.GELU), None),
    "silu": (put("mlp.act", nn.SiLU), "mlp.act"),
    "relu": (put("mlp.act", nn.ReLU), "mlp.act"),
    "exact function": (functional(published.Exact), "Exact"),
    "other eps in a function": (functional(published.OtherEps), "OtherEps"),
    "rows in no thirds": (set_in("attn.qkv", out_features=2), "attn.num_heads"),
    "gate last": (put("mlp", partial(published.Gated, gate_last=True)), "Block"),
    "layer norm of q and k": (qk(partial(nn.LayerNorm, D // H, 1e-6)), "attn.q_norm"),
    "rms of q and k, no eps": (qk(rms), "attn.q_norm.eps"),
    "rms without weights": (qk(partial(rms, 1e-6, False)), "attn.q_norm.elementwise_affine"),
    "own rms norm": (qk(published.OwnRMSNorm), "attn.q_norm"),
    "rms of q alone": (put("attn.q_norm", partial(rms, eps=1e-6)), "attn.q_norm"),
    "rms of k, other eps": (
        lambda block: (qk(partial(rms, eps=1e-6))(block), set_in("attn.k_norm", eps=1.0)(block)),
        "attn.k_norm.eps",
    ),
    "norm after attention": (put("attn.norm", partial(nn.LayerNorm, D)), "attn.norm"),
    "heads that do not divide": (set_in("attn", num_heads=5), "attn.num_heads"),
    "no heads": (lambda block: delattr(block.attn, "num_heads"), "attn.num_heads"),
    "lies about heads": (attention(published.TwoHeads), "Block"),
    "other scale": (set_in("attn", scale=1 / (D // H)), "attn.scale"),
    "rotated": (attention(published.Rotated), "Block"),
    "causal": (attention(published.Causal), "Block"),
    "affine norm2": (put("norm2", partial(nn.LayerNorm, D, 1e-6)), "norm2"),
    "weight without bias": (norms(partial(nn.LayerNorm, D, 1e-6, True, False)), "norm1"),
    "rms without eps": (norms(partial(nn.RMSNorm, D, None, False)), "norm1.eps"),
    "group norm": (norms(partial(nn.GroupNorm, 1, D)), "norm1"),
    "no bias of the modulation": (set_in("adaLN_modulation.1", bias=None), "adaLN_modulation.1"),
    "gelu of c": (put("adaLN_modulation.0", nn.GELU), "adaLN_modulation.0"),
    "more of c": (
        lambda block: block.adaLN_modulation.append(nn.Tanh()),
        "adaLN_modulation.2",
    ),
    "silu of the modulation": (
        lambda block: block.adaLN_modulation.append(nn.SiLU()),
        "adaLN_modulation.2",
    ),
    "dropout of one branch": (drops("attn.proj_drop"), "mlp.drop2.p"),
    "dropout of the other": (drops("mlp.drop2"), "mlp.drop2.p"),
    "dropout of the hidden layer": (drops("mlp.drop1"), "mlp.drop1"),
    "one dropout twice": (
        lambda b: (
            drops("attn.proj_drop", "mlp.drop2")(b),
            setattr(b.mlp, "drop1", b.attn.proj_drop),
        ),
        "mlp.drop1",
    ),
    "hook of a dropout": (
        lambda b: (
            drops("attn.proj_drop", "mlp.drop2")(b),
            b.mlp.drop2.register_forward_hook(lambda *args: args[2] + 1),
        ),
        "Block",
    ),
    "all left out": (set_in("attn.attn_drop", p=1.0), "attn.attn_drop.p"),
    "dropout of elements by rows": (put("attn.attn_drop", nn.Dropout1d), "attn.attn_drop"),
    "dropout in a kernel": (drops_in(published.Fused, "attn.attn_drop"), "attn.attn_drop"),
    "dropout of scores": (drops_in(published.DropsScores, "attn.attn_drop"), "Block"),
    "dropout before the projection": (
        drops_in(published.DropsFirst, "attn.proj_drop", "mlp.drop2"),
        "Block",
    ),
    "dropout in a function": (of_class(published.DropsInFunction), "DropsInFunction"),
    "layer scale": (lambda block: block.add_module("ls1", published.LayerScale()), "ls1"),
    "bias of positions": (
        lambda block: block.attn.register_parameter("table", nn.Parameter(torch.ones(3))),
        "attn.table",
    ),
    "lora": (put("attn.qkv", published.LoRALinear), "attn.qkv"),
    "weight norm": (lambda block: parametrizations.weight_norm(block.mlp.fc1), "mlp.fc1"),
    "hook": (
        lambda block: block.mlp.fc1.register_forward_hook(lambda *args: args[2] + 1),
        "Block",
    ),
    "parallel": (of_class(published.Parallel), "Parallel"),
    "scale first": (of_class(published.ScaleFirst), "ScaleFirst"),
    "two results": (of_class(published.Tuple), r"block\(x, c\)"),
    "no attention": (lambda block: delattr(block, "attn"), "attn.qkv"),
    "no activation of c": (
        lambda block: setattr(block, "adaLN_modulation", nn.Linear(COND, 6 * D)),
        "adaLN_modulation",
    ),
    "other dtypes": (lambda block: block.mlp.double(), "mlp.fc1.weight"),
}  # fmt: skip
