"""What a DiT block's modules compute, read of them part by part, and then of the block as a whole.

A part is known by its exact type: a subclass may compute anything. What stands in a block's own
forward no part shows, such as rotary positions or another order of the branches, so the block and
the layer that was read of it run once, in float64 and with other weights.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

from dbkernels.models.layer import AdaLNLayer, Attention, LayerConfig

NORMS = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}
PROJECTIONS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
# of a block that has them; one without may compute the same in its forward
PARTS = (
    "attn", "mlp", "adaLN_modulation", "adaLN_modulation.0", "adaLN_modulation.1", "norm1", "norm2",
    "attn.q_norm", "attn.k_norm", "mlp.act", *PROJECTIONS,
)  # fmt: skip
TOKENS = 4  # of the samples that a block and its layer both compute; a square, as some ask for
TOLERANCE = 1e-6  # of them: parts that compute in float32 whatever they are given are as near


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
    dim, heads = qkv.in_features, getattr(block.attn, "num_heads", None)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise ValueError(f"attn.num_heads must be a number that divides {dim}, got {heads}")
    scale = getattr(block.attn, "scale", (dim / heads) ** -0.5)
    if abs(scale * (dim / heads) ** 0.5 - 1) > TOLERANCE:
        raise ValueError(f"attn.scale must be {(dim / heads) ** -0.5}, got {scale}")
    norm, affine, eps = _norms(block)
    biases = {name: block.get_submodule(name).bias is not None for name in PROJECTIONS}
    if len(set(biases.values())) > 1:
        some = " and ".join(name for name, there in biases.items() if there)
        raise ValueError(f"all of {', '.join(biases)} or none must have a bias, got {some}")
    return LayerConfig(
        dim,
        heads,
        fc2.in_features,
        block.get_submodule("adaLN_modulation.1").in_features,
        norm=norm,
        affine=affine,
        mlp=_mlp(block, fc1, fc2),
        qk_norm=_qk_norm(block),
        bias=all(biases.values()),
        eps=eps,
    )


def check_computes_the_same(block: nn.Module, convert: Callable[[nn.Module], AdaLNLayer]) -> None:
    """Run a copy of a block with random weights, and the layer that is made of the copy.

    Raises:
        ValueError: the block does not run as block(x, c), or its output is another one.
    """
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        probe = copy.deepcopy(block).to("cpu", torch.float64).train()
        for parameter in probe.parameters():
            # each branch and each gate of the size of the stream
            parameter.copy_(normal(*parameter.shape) * parameter.shape[-1] ** -0.5 + 0.1)
        layer = convert(probe)
        dim, cond_dim = layer.config.dim, layer.config.cond_dim
        # a variance that shows the eps of a norm
        x, c = 0.1 * normal(2, TOKENS, dim) + 0.2, normal(2, cond_dim)
        try:
            expected = probe(x.clone(), c).view_as(x)
        except Exception as error:
            raise ValueError(f"a DiT block must run as block(x, c), got {error!r}") from error
        difference = (layer(x, c) - expected).abs().max() / expected.abs().max()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the forward of {type(block).__name__} must compute what its parts say, which is "
            f"{layer.config}, got an output that differs by {float(difference):.1e} of its size"
        )


def _check_known(block: nn.Module) -> None:
    """Whether each module is a part or does nothing, and each tensor is one of a part."""
    for name, module in block.named_modules():
        idle = type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
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
    return any(name == each for each, _ in block.named_modules())


def _norms(block: nn.Module) -> tuple[str, bool, float]:
    """Kind, whether it has weights, and eps."""
    there = [name for name in ("norm1", "norm2") if _has(block, name)]
    found = {}
    for name in there:
        norm = _check_part(block, name, *NORMS)
        named = dict(norm.named_parameters())
        if type(norm) is nn.LayerNorm and len(named) == 1:
            raise ValueError(f"{name} must have weight and bias or neither, got {', '.join(named)}")
        if norm.eps is None:
            raise ValueError(f"{name}.eps must be a number, got None")
        found[name] = NORMS[type(norm)], bool(named), norm.eps
    if len(found) == 2 and found["norm1"] != found["norm2"]:
        raise ValueError(f"norm2 must be as norm1 is, {found['norm1']}, got {found['norm2']}")
    return found[there[0]] if there else ("layer", False, LayerConfig.eps)


def _mlp(block: nn.Module, fc1: nn.Linear, fc2: nn.Linear) -> str:
    if fc1.out_features == 2 * fc2.in_features:
        _check_part(block, "mlp.act", nn.SiLU)
        return "swiglu"
    if _has(block, "mlp.act") and _check_part(block, "mlp.act", nn.GELU).approximate != "tanh":
        raise ValueError(f"mlp.act must be GELU of approximate tanh, got {block.mlp.act}")
    return "gelu"


def _qk_norm(block: nn.Module) -> bool:
    names = ("attn.q_norm", "attn.k_norm")
    there = [n for n in names if _has(block, n) and type(block.get_submodule(n)) is not nn.Identity]
    if len(there) == 1:
        raise ValueError(f"both of {', '.join(names)} must be norms or neither, got {there[0]}")
    config = LayerConfig(block.attn.qkv.in_features, block.attn.num_heads, 1, 1, qk_norm=True)
    with torch.device("meta"):
        ours = Attention(config).q_norm
    for name in there:
        norm = _check_part(block, name, nn.RMSNorm)
        settings = "normalized_shape", "eps", "elementwise_affine"
        for setting in settings:
            if (theirs := getattr(norm, setting)) != (value := getattr(ours, setting)):
                raise ValueError(f"{name}.{setting} must be {value}, got {theirs}")
    return bool(there)
