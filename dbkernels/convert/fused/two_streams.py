"""What diffusers' layers of two streams have in common: the names of their parts.

    norm1, norm1_context          linear: to the modulation; norm
    attn                          to_q, to_k, to_v, to_out.0 of x; add_q_proj, add_k_proj,
                                  add_v_proj, to_add_out of the context; norms of queries and keys
    attn2                         a second attention of x alone, where there is one
    ff, ff_context                net.0.proj, net.2

Each stream's three projections are one while the op runs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.convert.fused import parts
from dbkernels.convert.fused.layer import FusedLayer, check_no_dropout, normal, of_each_sample
from dbkernels.models.joint_layer import JointConfig
from dbkernels.ops import LayerWeights, joint_layer, linear
from dbkernels.ops.layer.recompute import Recompute

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


class FusedTwoStreams(FusedLayer):
    """A layer of the names above.

    Args:
        original:    of a class that `knows`
        recompute:   a key of `dbkernels.ops.POLICIES`
        processors:  names of the classes of attention that the op computes
    """

    def __init__(self, original: nn.Module, recompute: Recompute, processors: tuple[str, ...]):
        check_no_dropout(original)
        config = _read(original, processors)
        names = ("norm1", "norm1_context", "attn", "attn2", "norm2", "norm2_context", "ff")
        there = original._modules
        reads = (name for name in (*names, "ff_context") if there.get(name) is not None)
        super().__init__(original, recompute, tuple(reads))
        self.config = config

    def streams(self, random: torch.Generator) -> Sequence[Tensor]:
        """Of an example: x (2, 4, D), with a variance that shows the eps of a norm, the context
        (2, 3, D) likewise, and the condition."""
        D, cond_dim = self.config.dim, self.config.cond_dim
        x, context = (0.1 * normal(random, 2, tokens, D) + 0.2 for tokens in (4, 3))
        return x, context, normal(random, 2, cond_dim)

    def run_op(
        self,
        x: Tensor,
        context: Tensor,
        c: Tensor,
        rotary: Tensor | None = None,
        order: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x and the context, None where it is only keys and values.

        Args:
            x:        (B, S, D)
            context:  (B, T, D)
            c:        (B, cond_dim) or of a B of 1
            rotary:   (2, T + S, d), of an op
            order:    of the rows of queries, keys and values that it needs
        """
        silu = F.silu(of_each_sample(x, c))
        projections = self.norm1.linear, self.norm1_context.linear
        return joint_layer(
            x,
            context,
            *(linear(silu, each.weight, each.bias) for each in projections),
            self._weights(self.attn, order, self.ff),
            self._context_weights(order),
            second_weights=self._weights(self.attn2) if self.config.dual_attention else None,
            rotary=rotary,
            recompute=self.recompute,
            **self.config.of_op(),
        )

    def _weights(
        self, attn: nn.Module, order: Tensor | None = None, ff: nn.Module | None = None
    ) -> LayerWeights:
        qkv = parts.stacked([getattr(attn, name) for name in _QKV], order)
        others = _of(attn.to_out[0], *_of_mlp(ff))
        return LayerWeights(*qkv, *others, *self._norms(attn.norm_q, attn.norm_k, order))

    def _context_weights(self, order: Tensor | None) -> LayerWeights:
        attn, keys_only = self.attn, self.config.context_pre_only
        qkv = parts.stacked([getattr(attn, name) for name in _ADDED], order)
        others = _of(None if keys_only else attn.to_add_out, *_of_mlp(self.ff_context))
        norms = self._norms(attn.norm_added_q, attn.norm_added_k, order)
        return LayerWeights(*qkv, *others, *norms)

    def _norms(
        self, q_norm: nn.Module | None, k_norm: nn.Module | None, order: Tensor | None
    ) -> list[Tensor | None]:
        weights = [getattr(norm, "weight", None) for norm in (q_norm, k_norm)]
        if order is None:
            return weights
        own = order[: self.config.head_dim]  # of the first head, which are those of any
        return [None if weight is None else weight[own] for weight in weights]


def _of(*linears: nn.Module | None) -> list[Tensor | None]:
    """Weight and bias of each, None of what is not there."""
    return [getattr(each, kind, None) for each in linears for kind in ("weight", "bias")]


def _of_mlp(ff: nn.Module | None) -> tuple[nn.Module | None, nn.Module | None]:
    return (None, None) if ff is None else (ff.net[0].proj, ff.net[2])


def _read(original: nn.Module, processors: tuple[str, ...]) -> JointConfig:
    keys_only = original._modules.get("ff_context") is None
    dual = original._modules.get("attn2") is not None
    mlps = ["ff", *([] if keys_only else ["ff_context"])]
    names = [f"{mlp}.{part}" for mlp in mlps for part in ("net.0.proj", "net.2")]
    names += [f"attn.{name}" for name in (*_QKV, *_ADDED, "to_out.0")]
    names += [] if keys_only else ["attn.to_add_out"]
    names += [f"attn2.{name}" for name in (*_QKV, "to_out.0")] if dual else []
    found = dict(zip(names, parts.projections(original, *names), strict=True))
    q, condition = found["attn.to_q"], parts.projections(original, "norm1.linear")[0]
    parts.projections(original, "norm1_context.linear")
    attentions = ["attn", *(["attn2"] if dual else [])]
    for name in attentions:
        attn = original.get_submodule(name)
        if (processor := type(attn.processor).__name__) not in processors:
            raise ValueError(
                f"{name}.processor must be one of {', '.join(processors)}, got {processor}"
            )
        if getattr(attn, "fused_projections", False):
            raise ValueError(f"{name}.fused_projections must be False, got True")
        groups = (_QKV, _ADDED) if name == "attn" else (_QKV,)
        for group in groups:
            _check_alike(found, [f"{name}.{each}" for each in group], q.out_features)
    if dual and original.attn2.heads != original.attn.heads:
        got = original.attn2.heads
        raise ValueError(f"attn2.heads must be those of attn, {original.attn.heads}, got {got}")
    activations = {parts.gelu_of(original, f"{mlp}.net.0") for mlp in mlps}
    if len(activations) > 1:
        raise ValueError(f"ff_context must have the activation of ff, got {sorted(activations)}")
    qk_eps = _qk_eps_of(original, attentions)
    return JointConfig(
        q.in_features,
        original.attn.heads,
        found["ff.net.2"].in_features,
        condition.in_features,
        norm="layer",
        mlp=activations.pop(),
        eps=_eps_of(original, keys_only),
        qk_eps=1e-6 if qk_eps is None else qk_eps,
        head_dim=parts.head_width_of(original, "attn", "heads", q.out_features, 1),
        context_pre_only=keys_only,
        dual_attention=dual,
    )


def _check_alike(found: dict[str, nn.Linear], names: list[str], width: int) -> None:
    """Three projections of one width, all of which have a bias or none."""
    if len({found[name].bias is None for name in names}) > 1:
        raise ValueError(f"all of {', '.join(names)} must have a bias or none, got some")
    for name in names:
        if found[name].out_features != width:
            raise ValueError(f"{name} must be {width} wide, got {found[name].out_features}")


def _eps_of(original: nn.Module, keys_only: bool) -> float:
    """Of all norms of the streams, which have no weights."""
    names = ["norm1.norm", "norm1_context.norm", "norm2"]
    names += [] if keys_only else ["norm2_context"]
    norms = {name: parts.norm_of(original, name) for name in names}
    for name, norm in norms.items():
        if norm != ("layer", norms["norm2"].eps):
            raise ValueError(f"{name} must be a layer norm of norm2's eps, got {norm}")
        if parts.affine_of(original.get_submodule(name)) != (None, None):
            raise ValueError(f"{name} must have no weight, got one")
    return norms["norm2"].eps


def _qk_eps_of(original: nn.Module, attentions: list[str]) -> float | None:
    """Of all norms of queries and keys; None where there are none."""
    pairs = [(f"{name}.norm_q", f"{name}.norm_k") for name in attentions]
    pairs.append(("attn.norm_added_q", "attn.norm_added_k"))
    each = [parts.qk_eps_of(original, *pair) for pair in pairs]
    found = {eps for eps in each if eps is not None}
    if len(found) > 1:
        raise ValueError(f"all norms of queries and keys must have one eps, got {sorted(found)}")
    return found.pop() if found else None
