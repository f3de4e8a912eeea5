"""What a DiT block's modules compute, read of them part by part.

A part is known by its exact type: a subclass may compute anything. What stands in a block's own
forward no part shows; see `dbkernels.convert.probe`.
"""

from collections.abc import Collection

from torch import nn

from dbkernels.models.branches import BIASED
from dbkernels.models.layer import LayerConfig

NORMS = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}
# in the order of BIASED
PROJECTIONS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
# of a block that has them; one without may compute the same in its forward
PARTS = (
    "attn", "mlp", "adaLN_modulation", "adaLN_modulation.0", "adaLN_modulation.1", "norm1", "norm2",
    "attn.q_norm", "attn.k_norm", "mlp.act", *PROJECTIONS,
)  # fmt: skip
# of the attention's weights, and of what each branch adds, in the order of a layer's places
DROPOUTS = ("attn.attn_drop", "attn.proj_drop", "mlp.drop2")
TOLERANCE = 1e-6  # of a scale, which may have been rounded to float32


def read_config(block: nn.Module) -> LayerConfig:
    """The configuration of the layer that computes what a block's parts do.

    Raises:
        ValueError: a part is missing, or no layer has such a part; the part is named.
    """
    _check_known(block)
    for name in (*PROJECTIONS, "adaLN_modulation.1"):
        _check_part(block, name, nn.Linear)
    _check_part(block, "adaLN_modulation.0", nn.SiLU)
    if block.get_submodule("adaLN_modulation.1").bias is None:
        raise ValueError("adaLN_modulation.1 must have a bias, got none")
    fc1, fc2, qkv = (block.get_submodule(name) for name in ("mlp.fc1", "mlp.fc2", "attn.qkv"))
    heads = getattr(block.attn, "num_heads", None)
    d = head_width(qkv.out_features, heads, "attn.num_heads")
    scale = getattr(block.attn, "scale", d**-0.5)
    if abs(scale * d**0.5 - 1) > TOLERANCE:
        raise ValueError(f"attn.scale must be {d**-0.5}, got {scale}")
    norm, affine, eps, eps2 = _norms(block)
    qk_eps = _qk_eps(block, d)
    dropout, attention_dropout = _dropout(block)
    return LayerConfig(
        qkv.in_features,
        heads,
        fc2.in_features,
        block.get_submodule("adaLN_modulation.1").in_features,
        norm=norm,
        affine=affine,
        mlp=_mlp(block, fc1, fc2),
        qk_norm=qk_eps is not None,
        bias=bias_of([n for n in PROJECTIONS if block.get_submodule(n).bias is not None]),
        eps=eps,
        eps2=None if eps2 == eps else eps2,
        qk_eps=LayerConfig.qk_eps if qk_eps is None else qk_eps,
        head_dim=None if d * heads == qkv.in_features else d,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )


def head_width(rows: int, heads: object, name: str) -> int:
    """Width of a head, of the rows of the projection to queries, keys and values.

    Raises:
        ValueError: the number of heads, which has the name in its block or call, does not divide.
    """
    if not isinstance(heads, int) or heads < 1 or rows < 1 or rows % (3 * heads):
        raise ValueError(
            f"{name} must be a number that divides a third of attn.qkv's {rows} rows, got {heads}"
        )
    return rows // (3 * heads)


def bias_of(there: Collection[str]) -> bool | tuple[str, ...]:
    """`LayerConfig.bias` of the projections that have one."""
    ours = tuple(name for theirs, name in zip(PROJECTIONS, BIASED, strict=True) if theirs in there)
    return ours if 0 < len(ours) < len(BIASED) else bool(ours)


def _check_known(block: nn.Module) -> None:
    """Whether each module is a part or does nothing, and each tensor is one of a part."""
    for name, module in block.named_modules(remove_duplicate=False):
        dropout = type(module) is nn.Dropout and (module.p == 0 or name in DROPOUTS)
        idle = type(module) is nn.Identity or dropout
        if name and name not in PARTS and not idle:
            raise ValueError(f"no layer has what {name} is: {module}")
    own = [name for name in PARTS if name not in ("attn", "mlp", "adaLN_modulation")]
    for name, _ in (*block.named_parameters(), *block.named_buffers()):
        if name.rpartition(".")[0] not in own:
            raise ValueError(f"no layer has what {name} is: a tensor beside the parts of a block")


def _check_part(block: nn.Module, name: str, *kinds: type[nn.Module]) -> nn.Module:
    try:
        part = block.get_submodule(name)
    except AttributeError:
        raise ValueError(f"a DiT block must have {name}, got none in {block}") from None
    if type(part) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be a plain {names}, got {part}")
    return part


def _has(block: nn.Module, name: str) -> bool:
    return any(name == each for each, _ in block.named_modules(remove_duplicate=False))


def _norms(block: nn.Module) -> tuple[str, bool, float, float]:
    """Kind, whether they have weights, and the eps of each."""
    kinds, eps = {}, {}
    for name in ("norm1", "norm2"):
        if not _has(block, name):
            continue
        norm = _check_part(block, name, *NORMS)
        named = dict(norm.named_parameters())
        if type(norm) is nn.LayerNorm and len(named) == 1:
            raise ValueError(f"{name} must have weight and bias or neither, got {', '.join(named)}")
        if norm.eps is None:
            raise ValueError(f"{name}.eps must be a number, got None")
        kinds[name], eps[name] = (NORMS[type(norm)], bool(named)), norm.eps
    if len(set(kinds.values())) > 1:
        said = {name: f"{kind}, affine {affine}" for name, (kind, affine) in kinds.items()}
        raise ValueError(f"norm2 must be as norm1 is, {said['norm1']}, got {said['norm2']}")
    kind, affine = next(iter(kinds.values()), ("layer", False))
    first, *others = eps.values() or (LayerConfig.eps,)
    return kind, affine, first, others[0] if others else first


def _mlp(block: nn.Module, fc1: nn.Linear, fc2: nn.Linear) -> str:
    if fc1.out_features == 2 * fc2.in_features:
        _check_part(block, "mlp.act", nn.SiLU)
        return "swiglu"
    if _has(block, "mlp.act") and _check_part(block, "mlp.act", nn.GELU).approximate == "none":
        return "gelu_exact"
    return "gelu"


def _qk_eps(block: nn.Module, d: int) -> float | None:
    """Eps of the RMS norms of queries and keys, or None where there are none."""
    names = ("attn.q_norm", "attn.k_norm")
    there = [n for n in names if _has(block, n) and type(block.get_submodule(n)) is not nn.Identity]
    if len(there) == 1:
        raise ValueError(f"both of {', '.join(names)} must be norms or neither, got {there[0]}")
    eps = None
    for name in there:
        norm = _check_part(block, name, nn.RMSNorm)
        # torch's own choice for None goes by the dtype
        if norm.eps is None:
            raise ValueError(f"{name}.eps must be a number, got None")
        eps = norm.eps if eps is None else eps
        layer = {"normalized_shape": (d,), "eps": eps, "elementwise_affine": True}
        for setting, value in layer.items():
            if (theirs := getattr(norm, setting)) != value:
                raise ValueError(f"{name}.{setting} must be {value}, got {theirs}")
    return eps


def _dropout(block: nn.Module) -> tuple[float, float]:
    """Shares of each branch's output and of the attention's weights."""
    # none of a module that is missing or an Identity
    modules = {n: block.get_submodule(n) if _has(block, n) else None for n in DROPOUTS}
    shares = {n: m.p if type(m) is nn.Dropout else 0.0 for n, m in modules.items()}
    for name, share in shares.items():
        if not share < 1:
            raise ValueError(f"{name}.p must be below 1, got {share}")
    of_weights, first, second = shares.values()
    if first != second:
        raise ValueError(f"mlp.drop2.p must be {first} as attn.proj_drop.p is, got {second}")
    return first, of_weights
