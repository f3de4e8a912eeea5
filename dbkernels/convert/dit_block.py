"""The weights of a published DiT's transformer layer, which it calls a block, and an AdaLNLayer's.

    attn.qkv, attn.proj, attn.q_norm, attn.k_norm    attention.qkv, .out, .q_norm, .k_norm
    mlp.fc1, mlp.fc2                                 mlp.fc1, mlp.fc2
    adaLN_modulation.1                               modulation
    norm1, norm2                                     norm1, norm2

Peebles & Xie 2023 (arXiv:2212.09748), and the many models that kept its names. Its norms have no
weights, its GELU is the tanh form, and the attention's shift, scale and gate come before the MLP's.
No number changes.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from dbkernels.convert.read_block import check_computes_the_same, read_config
from dbkernels.models.layer import AdaLNLayer, LayerConfig
from dbkernels.settings import check_choice

_PARTS = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "adaLN_modulation.1": "modulation",
    "norm1": "norm1",
    "norm2": "norm2",
}


def layer_from_dit_block(block: nn.Module) -> AdaLNLayer:
    """An AdaLNLayer that computes what a DiT block does.

    The parts of the block are read by their names and types. A copy of the block then runs once
    with random weights, for its own forward may compute anything.

    Args:
        block:  called as block(x, c), with the parts' names of the published DiT
    Returns:
        A layer of its own memory, on the device and in the dtypes of the block.
    Raises:
        ValueError: the block has a part that no layer has, which the message names, or its forward
            computes something else than its parts say.
    """
    check_computes_the_same(block, _converted)
    return _converted(block)


def _converted(block: nn.Module) -> AdaLNLayer:
    return _loaded(read_config(block), block.state_dict())


def layer_from_dit_state(
    state: Mapping[str, Tensor],
    *,
    num_heads: int,
    activation: Literal["gelu_tanh"],
    qk_norm: Literal["none", "rms"],
    eps: float,
) -> AdaLNLayer:
    """An AdaLNLayer of a DiT block's weights alone, which do not show all that the block computes.

    Args:
        state:       state dict of one block, with the names of the published DiT
        num_heads:   of its attention
        activation:  gelu_tanh, which is `nn.GELU(approximate="tanh")`; no layer has another one
        qk_norm:     rms, of eps 1e-6, or none; no layer has another norm of queries and keys
        eps:         of its norms, which have no weights
    Returns:
        A layer of its own memory, on the device and in the dtypes of the state's tensors.
    Raises:
        ValueError: a name is missing or unknown, a shape disagrees, or no layer has such a part.
    """
    check_choice("activation", activation, ("gelu_tanh",))
    check_choice("qk_norm", qk_norm, ("none", "rms"))
    for name in ("attn.qkv.weight", "mlp.fc1.weight", "adaLN_modulation.1.weight"):
        if name not in state:
            raise ValueError(f"a DiT block has {name}, got {', '.join(state) or 'nothing'}")
    config = LayerConfig(
        dim=state["attn.qkv.weight"].shape[1],
        num_heads=num_heads,
        mlp_hidden=len(state["mlp.fc1.weight"]),
        cond_dim=state["adaLN_modulation.1.weight"].shape[1],
        qk_norm=qk_norm == "rms",
        bias="attn.qkv.bias" in state,
        eps=eps,
    )
    return _loaded(config, state)


def _loaded(config: LayerConfig, state: Mapping[str, Tensor]) -> AdaLNLayer:
    layer = AdaLNLayer(config)
    translated = {_translate(name, _PARTS): t.detach().clone() for name, t in state.items()}
    dtype = state["attn.qkv.weight"].dtype
    for name, tensor in state.items():
        if tensor.dtype != dtype and name.startswith(("attn.", "mlp.")):
            raise ValueError(f"{name} must be {dtype} as attn.qkv is, got {tensor.dtype}")
    try:
        layer.load_state_dict(translated, assign=True)
    except RuntimeError as error:
        raise ValueError(f"not the weights of a DiT block: {error}") from None
    return layer


def dit_block_from_layer(layer: AdaLNLayer) -> dict[str, Tensor]:
    """The state dict that a DiT block loads to compute what the layer does; it shares memory.

    The block must have the layer's number of heads, and RMS norms of queries and keys where the
    layer has them.

    Raises:
        ValueError: the published DiT has no such layer (RMS norm, affine norms, SwiGLU, other eps,
            silu after the modulation's projection).
    """
    config = layer.config
    theirs = {
        "norm": "layer",
        "affine": False,
        "mlp": "gelu",
        "eps": 1e-6,
        "silu_modulation": False,
    }
    for name, value in theirs.items():
        if (ours := getattr(config, name)) != value:
            raise ValueError(f"{name} must be {value} in a DiT block, got {ours}")
    names = {ours: theirs for theirs, ours in _PARTS.items()}
    return {_translate(name, names): tensor for name, tensor in layer.state_dict().items()}


def _translate(name: str, parts: Mapping[str, str]) -> str:
    part, _, kind = name.rpartition(".")
    if part not in parts:
        raise ValueError(f"a DiT block has no {name}")
    return f"{parts[part]}.{kind}"
