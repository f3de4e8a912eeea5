"""The weights of a published DiT's transformer layer, which it calls a block, and an AdaLNLayer's.

    attn.qkv, attn.proj, attn.q_norm, attn.k_norm    attention.qkv, .out, .q_norm, .k_norm
    mlp.fc1, mlp.fc2                                 mlp.fc1, mlp.fc2
    adaLN_modulation.1                               modulation

Peebles & Xie 2023 (arXiv:2212.09748), and the many models that kept its names. Their norms have no
weights, their GELU is the tanh form, and the attention's shift, scale and gate come before the
MLP's. No number changes.
"""

from collections.abc import Mapping

from torch import Tensor

from dbkernels.models.layer import AdaLNLayer, LayerConfig

_PARTS = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "adaLN_modulation.1": "modulation",
}


def layer_from_dit_block(state: Mapping[str, Tensor], num_heads: int) -> AdaLNLayer:
    """An AdaLNLayer that computes what a DiT block with these weights does.

    Args:
        state:      state dict of one block, with the names of the published DiT
        num_heads:  of its attention; a state dict does not tell
    Returns:
        A layer of its own memory, in the dtype and on the device of the state's tensors.
    Raises:
        ValueError: a name is missing or unknown, or a shape disagrees.
    """
    for name in ("attn.qkv.weight", "mlp.fc1.weight", "adaLN_modulation.1.weight"):
        if name not in state:
            raise ValueError(f"a DiT block has {name}, got {', '.join(state) or 'nothing'}")
    qkv, modulation = state["attn.qkv.weight"], state["adaLN_modulation.1.weight"]
    config = LayerConfig(
        dim=qkv.shape[1],
        num_heads=num_heads,
        mlp_hidden=len(state["mlp.fc1.weight"]),
        cond_dim=modulation.shape[1],
        qk_norm="attn.q_norm.weight" in state,
        bias="attn.qkv.bias" in state,
    )
    layer = AdaLNLayer(config).to(qkv)
    translated = {_translate(name, _PARTS): tensor for name, tensor in state.items()}
    try:
        layer.load_state_dict(translated)
    except RuntimeError as error:
        raise ValueError(f"not the weights of a DiT block: {error}") from None
    return layer


def dit_block_from_layer(layer: AdaLNLayer) -> dict[str, Tensor]:
    """The state dict that a DiT block loads to compute what the layer does; it shares memory.

    Raises:
        ValueError: the published DiT has no such layer (RMS norm, affine norms, another MLP, silu
            after the modulation's projection).
    """
    config = layer.config
    if config.norm != "layer" or config.affine or config.mlp != "gelu":
        raise ValueError(
            "a DiT block has norm layer, no affine and mlp gelu, "
            f"got norm {config.norm}, affine {config.affine} and mlp {config.mlp}"
        )
    if config.silu_modulation:
        raise ValueError("a DiT block has no silu after its projection, got silu_modulation True")
    names = {ours: theirs for theirs, ours in _PARTS.items()}
    return {_translate(name, names): tensor for name, tensor in layer.state_dict().items()}


def _translate(name: str, parts: Mapping[str, str]) -> str:
    part, _, kind = name.rpartition(".")
    if part not in parts:
        raise ValueError(f"a DiT block has no {name}")
    return f"{parts[part]}.{kind}"
