"""The weights of a published DiT's transformer layer, which it calls a block, and an AdaLNLayer's.

    attn.qkv, attn.proj, attn.q_norm, attn.k_norm    attention.qkv, .out, .q_norm, .k_norm
    mlp.fc1, mlp.fc2                                 mlp.fc1, mlp.fc2
    adaLN_modulation.1                               modulation
    norm1, norm2                                     norm1, norm2

Peebles & Xie 2023 (arXiv:2212.09748), and the many models that kept its names, some with norms, an
MLP or heads of another kind. The attention's shift, scale and gate come before the MLP's. No number
changes.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from dbkernels.convert.probe import check_computes_the_same
from dbkernels.convert.read_block import PROJECTIONS, bias_of, head_width, read_config
from dbkernels.models.layer import AdaLNLayer, LayerConfig
from dbkernels.settings import check_choice

_ACTIVATIONS = {"gelu_tanh": "gelu", "gelu_exact": "gelu_exact", "swiglu": "swiglu"}
# of a layer: their names, and ours
PARTS = {
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
    with random weights, for its own forward may compute anything. Where the block leaves out a
    share of its branches or of its attention's weights in training, the layer does so with a draw.

    Args:
        block:  called as block(x, c), with the parts' names of the published DiT
    Returns:
        A layer of its own memory, on the device and in the dtypes of the block.
    Raises:
        ValueError: the block has a part that no layer has, which the message names, or its forward
            computes something else than its parts say.
    """
    layer = _converted(block)
    check_computes_the_same(block, _converted)
    return layer


def _converted(block: nn.Module) -> AdaLNLayer:
    return _loaded(read_config(block), block.state_dict())


def layer_from_dit_state(
    state: Mapping[str, Tensor],
    *,
    num_heads: int,
    activation: Literal["gelu_tanh", "gelu_exact", "swiglu"],
    qk_norm: Literal["none", "rms"],
    eps: float,
    eps2: float | None = None,
    qk_eps: float = 1e-6,
) -> AdaLNLayer:
    """An AdaLNLayer of a DiT block's weights alone, which do not show all that the block computes.

    They show a head's width, which projections have a bias, and whether the norms have weights.

    Args:
        state:       state dict of one block, with the names of the published DiT
        num_heads:   of its attention
        activation:  gelu_tanh, which is `nn.GELU(approximate="tanh")`; gelu_exact, which is
                     `nn.GELU()`; or swiglu, where fc1 gives what silu takes and then the other half
        qk_norm:     rms or none; no layer has another norm of queries and keys
        eps:         of its layer norms
        eps2:        of the norm before the MLP, where it has another; None is eps
        qk_eps:      of the norms of queries and keys
    Returns:
        A layer of its own memory and without dropout, on the device and in the dtypes of the
        state's tensors.
    Raises:
        ValueError: a name is missing or unknown, a shape disagrees, or no layer has such a part.
    """
    check_choice("activation", activation, _ACTIVATIONS)
    check_choice("qk_norm", qk_norm, ("none", "rms"))
    shown = ("attn.qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight", "adaLN_modulation.1.weight")
    for name in shown:
        if name not in state:
            raise ValueError(f"a DiT block has {name}, got {', '.join(state) or 'nothing'}")
        if state[name].dim() != 2:
            raise ValueError(f"{name} must be (rows, columns), got {tuple(state[name].shape)}")
    rows, dim = state["attn.qkv.weight"].shape
    d = head_width(rows, num_heads, "num_heads")
    config = LayerConfig(
        dim=dim,
        num_heads=num_heads,
        mlp_hidden=state["mlp.fc2.weight"].shape[1],
        cond_dim=state["adaLN_modulation.1.weight"].shape[1],
        affine="norm1.weight" in state,
        mlp=_ACTIVATIONS[activation],
        qk_norm=qk_norm == "rms",
        bias=bias_of([name for name in PROJECTIONS if f"{name}.bias" in state]),
        eps=eps,
        eps2=None if eps2 == eps else eps2,
        qk_eps=qk_eps,
        head_dim=None if d * num_heads == dim else d,
    )
    return _loaded(config, state)


def _loaded(config: LayerConfig, state: Mapping[str, Tensor]) -> AdaLNLayer:
    layer = AdaLNLayer(config)
    translated = {_translate(name, PARTS): t.detach().clone() for name, t in state.items()}
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

    The block must be made with what a state dict does not show: the layer's number of heads, norms,
    activation, each eps, and dropout. It is where `layer_from_dit_block` reads the layer's config
    of it.

    Raises:
        ValueError: a DiT block has no such layer (silu after the modulation's projection).
    """
    if layer.config.silu_modulation:
        raise ValueError("silu_modulation must be False in a DiT block, got True")
    names = {ours: theirs for theirs, ours in PARTS.items()}
    return {_translate(name, names): tensor for name, tensor in layer.state_dict().items()}


def _translate(name: str, parts: Mapping[str, str]) -> str:
    part, _, kind = name.rpartition(".")
    if part not in parts:
        raise ValueError(f"a DiT block has no {name}")
    return f"{parts[part]}.{kind}"
