"""Layers and models for tests of tensor parallelism: whole in one process, cut in several."""

from dataclasses import replace
from functools import partial

import torch
from models.tiny import CONFIGS, DRAW, make_batch, randomise

from dbkernels.models import (
    AdaLNLayer,
    CrossConfig,
    CrossLayer,
    JointConfig,
    JointLayer,
    LayerConfig,
    ParallelConfig,
    ParallelLayer,
    family_named,
)
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import POLICIES
from dbkernels.training.diffusion_blocks import DiffusionBlocks

B, T, D, H, C, S = 4, 6, 24, 4, 7, 5
EVERY_POLICY = list(POLICIES)
CONFIG = LayerConfig(dim=D, num_heads=H, mlp_hidden=20, cond_dim=C)
TABLE = rotary_table(torch.arange(T), D // H)
MODELS = ("vit", "dit", "mmdit", "ar", "mdm", "huginn")


class Case:
    """A layer, and what it is given beside a stream, a condition and, where it reads one, a
    context."""

    def __init__(self, config, *, per_token=False, lengths=False, **told):
        self.config, self.told, self.per_token, self.lengths = config, told, per_token, lengths

    @property
    def kind(self):
        kinds = {ParallelConfig: ParallelLayer, CrossConfig: CrossLayer, JointConfig: JointLayer}
        return kinds.get(type(self.config), AdaLNLayer)

    def layer(self, recompute="none", dtype=torch.float64):
        torch.manual_seed(0)
        layer = randomise(self.kind(replace(self.config, recompute=recompute)))
        return layer if dtype == torch.float32 else layer.to(dtype)

    def inputs(self, dtype=torch.float64):
        """By name, as the layer takes them; all have gradients."""
        normal = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=dtype)
        given = {"x": normal(B, T, D) + 2, "c": normal(*([B, T] if self.per_token else [B]), C)}
        if self.kind is CrossLayer:
            given["context"] = normal(B, S, self.config.context_dim)
        if self.kind is JointLayer:
            given["context"] = normal(B, S, D) - 1
        return given

    def run(self, layer, given, **told):
        """What the layer makes of inputs, as one tensor."""
        if self.lengths:
            told["lengths"] = torch.tensor([S, 2, 0, 1])
        result = layer(**given, **self.told, **told)
        if isinstance(result, torch.Tensor):
            return result
        return torch.cat([t for t in result if t is not None], dim=1)

    def results(self, layer, given=None, **told):
        """Output and gradients by name."""
        given = {name: t.requires_grad_() for name, t in (given or self.inputs()).items()}
        out = self.run(layer, given, **told)
        (out * torch.linspace(-1, 2, D, dtype=out.dtype)).square().sum().backward()
        found = {"out": out.detach()} | {f"d{name}": t.grad for name, t in given.items()}
        return found | {name: p.grad for name, p in layer.named_parameters()}


_swiglu = replace(CONFIG, mlp="swiglu")
_normed = replace(CONFIG, qk_norm=True)
_joint = JointConfig(dim=D, num_heads=H, mlp_hidden=20, cond_dim=C, qk_norm=True)
CASES = {
    "gelu": Case(CONFIG),
    "gelu_exact": Case(replace(CONFIG, mlp="gelu_exact", bias=False)),
    "swiglu": Case(replace(_swiglu, bias=("qkv", "fc2"), norm="rms")),
    "norms": Case(replace(_normed, mlp="swiglu", affine=True), rotary=TABLE),
    "wide heads": Case(replace(CONFIG, head_dim=8, silu_modulation=True)),
    "causal": Case(_swiglu, attention="causal", rotary=TABLE),
    "two_stream": Case(_normed, attention="two_stream"),
    "noisy stream": Case(CONFIG, attention="two_stream", num_samples=B // 2),
    "num_queries": Case(replace(_normed, mlp="swiglu"), num_queries=2, rotary=TABLE),
    "dropout": Case(replace(CONFIG, dropout=0.4), draw=DRAW),
    "condition of tokens": Case(replace(_normed, affine=True), per_token=True),
    "parallel": Case(
        ParallelConfig(dim=D, num_heads=H, mlp_hidden=20, cond_dim=C, qk_norm=True), rotary=TABLE
    ),
    "parallel swiglu": Case(
        ParallelConfig(dim=D, num_heads=H, mlp_hidden=20, cond_dim=C, mlp="swiglu", bias=("fc2",)),
        per_token=True,
    ),
    "cross": Case(
        CrossConfig(dim=D, num_heads=H, mlp_hidden=20, cond_dim=C, context_dim=9), lengths=True
    ),
    "joint": Case(replace(_joint, dual_attention=True)),
    "keys": Case(replace(_joint, mlp="swiglu", context_pre_only=True)),
}


def blocks_of(family):
    """DiffusionBlocks of a small model, in two blocks."""
    of_family = family_named(family).model
    torch.manual_seed(3)
    model = of_family(of_family.presets.get("digits") or CONFIGS[family])
    return DiffusionBlocks(randomise(model, 0.1), 2)


def model_results(blocks):
    """A loss of the second block, and all gradients by the name of the parameter."""
    loss = blocks.loss(blocks[1], make_batch(blocks.model), DRAW)
    loss.backward()
    grads = {name: p.grad for name, p in blocks.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}
