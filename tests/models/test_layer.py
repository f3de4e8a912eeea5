import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from models.tiny import randomise
from torch import nn

from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.models.rotary import rotary_table

B, T, D, H = 3, 5, 12, 3
CONFIG = LayerConfig(dim=D, num_heads=H, mlp_hidden=20, cond_dim=7)
OPTIONS = [
    LayerConfig(D, H, 20, 7, norm, affine, mlp, qk_norm, bias, eps=0.01)
    for norm, affine, mlp, qk_norm, bias in product(
        ["layer", "rms"], [False, True], ["gelu", "swiglu"], [False, True], [False, True]
    )
]
CHUNKS = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")


def inputs(dtype=torch.float32, *, per_token=False):
    # a mean far from zero tells layer norm from RMS norm
    x = torch.randn(B, T, D, dtype=dtype) + 2
    return x, torch.randn((B, T, 7) if per_token else (B, 7), dtype=dtype)


def rotary():
    return rotary_table(torch.arange(T), D // H)


def normed(norm, config, x):
    if config.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt()
    if config.affine:
        x = x * norm.weight
        x = x + norm.bias if config.norm == "layer" else x
    return x


def silu(x):
    return x / (1 + torch.exp(-x))


def turned(x, base=10000.0):
    """Rotary positions as a multiplication of complex numbers; x (B, T, H, d)."""
    half = x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequency
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def attention(part, config, x, rotated):
    """Attention one head at a time, by an explicit softmax."""
    d = D // H
    q, k, v = part.qkv(x).split(D, dim=-1)
    q, k, v = (t.reshape(*x.shape[:2], H, d) for t in (q, k, v))
    if config.qk_norm:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * part.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * part.k_norm.weight
    if rotated:
        q, k = turned(q), turned(k)
    heads = []
    for head in range(H):
        scores = q[:, :, head] @ k[:, :, head].transpose(1, 2) / math.sqrt(d)
        heads.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[:, :, head])
    return part.out(torch.cat(heads, dim=-1))


def mlp(part, config, x):
    x = part.fc1(x)
    if config.mlp == "swiglu":
        return part.fc2(silu(x[..., :20]) * x[..., 20:])
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return part.fc2(0.5 * x * (1 + torch.tanh(inner)))


def exact(layer, config, x, c, rotated):
    """The two equations at the head of layer.py."""
    m = silu(c) @ layer.modulation.weight.T + layer.modulation.bias
    m = m if m.dim() == 3 else m[:, None].expand(-1, T, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (m[..., i * D : (i + 1) * D] for i in range(6))
    h = (1 + scale1) * normed(layer.norm1, config, x) + shift1
    x = x + gate1 * attention(layer.attention, config, h, rotated)
    h = (1 + scale2) * normed(layer.norm2, config, x) + shift2
    return x + gate2 * mlp(layer.mlp, config, h)


@pytest.mark.parametrize("config", OPTIONS)
def test_a_new_layer_returns_its_input_bitwise(config):
    layer = AdaLNLayer(config)
    x, c = inputs()
    assert torch.equal(layer(x, c), x)
    assert torch.equal(layer(x, c, rotary()), x)


@pytest.mark.parametrize("config", OPTIONS)
def test_agrees_with_the_equations(config):
    layer = randomise(AdaLNLayer(config)).double()
    for per_token, rotated in product([False, True], repeat=2):
        x, c = inputs(torch.float64, per_token=per_token)
        tolerance = 1e-5 if rotated else 1e-10  # the table is float32
        actual = layer(x, c, rotary() if rotated else None)
        expected = exact(layer, config, x, c, rotated)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_condition_of_the_sample_is_the_condition_of_each_token():
    layer = randomise(AdaLNLayer(CONFIG))
    x, c = inputs()
    torch.testing.assert_close(layer(x, c), layer(x, c[:, None].expand(B, T, 7)))


@pytest.mark.parametrize("open_gate", [None, "gate1", "gate2"])
def test_a_closed_gate_closes_its_branch_alone(open_gate):
    layer = AdaLNLayer(CONFIG)
    x, c = inputs()
    with torch.no_grad():
        for name, bias in zip(CHUNKS, layer.modulation.bias.chunk(6), strict=True):
            bias.fill_(1.0 if name == open_gate or "gate" not in name else 0.0)
    h = 2 * layer.norm1(x) + 1
    branches = {
        None: 0,
        "gate1": attention(layer.attention, CONFIG, h, rotated=False),
        "gate2": mlp(layer.mlp, CONFIG, h),
    }
    torch.testing.assert_close(layer(x, c), x + branches[open_gate])


def test_tokens_may_be_permuted_unless_positions_rotate_them():
    layer = randomise(AdaLNLayer(CONFIG)).double()
    x, c = inputs(torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(layer(x[:, order], c), layer(x, c)[:, order])
    moved = layer(x[:, order], c, rotary()), layer(x, c, rotary())[:, order]
    assert not torch.allclose(*moved, atol=1e-3)


def test_samples_do_not_see_each_other():
    layer = randomise(AdaLNLayer(CONFIG))
    x, c = (value.requires_grad_() for value in inputs())
    layer(x, c, rotary())[1].square().sum().backward()
    for grad in (x.grad, c.grad):
        assert not grad[[0, 2]].any() and grad[1].all()


@pytest.mark.parametrize("config", [OPTIONS[0], OPTIONS[-1]])
def test_gradients_reach_all_parameters(config):
    layer = randomise(AdaLNLayer(config))
    layer(*inputs(), rotary()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_a_new_layer_learns_through_its_gates_first():
    layer = AdaLNLayer(CONFIG)
    layer(*inputs()).square().sum().backward()
    chunks = dict(zip(CHUNKS, layer.modulation.bias.grad.chunk(6), strict=True))
    assert {name for name, grad in chunks.items() if grad.any()} == {"gate1", "gate2"}
    assert not layer.attention.qkv.weight.grad.any() and not layer.mlp.fc2.weight.grad.any()


def test_the_state_of_the_default_layer():
    assert {name: tuple(t.shape) for name, t in AdaLNLayer(CONFIG).state_dict().items()} == {
        "attention.qkv.weight": (36, 12),
        "attention.qkv.bias": (36,),
        "attention.out.weight": (12, 12),
        "attention.out.bias": (12,),
        "mlp.fc1.weight": (20, 12),
        "mlp.fc1.bias": (20,),
        "mlp.fc2.weight": (12, 20),
        "mlp.fc2.bias": (12,),
        "modulation.weight": (72, 7),
        "modulation.bias": (72,),
    }


def test_options_add_and_remove_parameters():
    def names(**options):
        return set(AdaLNLayer(replace(CONFIG, **options)).state_dict())

    default = names()
    norms = {f"norm{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
    assert names(affine=True) - default == norms
    assert names(affine=True, norm="rms") - default == {"norm1.weight", "norm2.weight"}
    assert names(qk_norm=True) - default == {"attention.q_norm.weight", "attention.k_norm.weight"}
    assert default - names(bias=False) == {
        f"{part}.bias" for part in ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")
    }
    swiglu = AdaLNLayer(replace(CONFIG, mlp="swiglu")).mlp
    assert swiglu.fc1.weight.shape == (40, 12) and swiglu.fc2.weight.shape == (12, 20)


@pytest.mark.parametrize("bias", [False, True])
def test_initialise_sets_the_projections_and_nothing_else(bias):
    layer = randomise(AdaLNLayer(replace(CONFIG, affine=True, qk_norm=True, bias=bias)))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.initialise(nn.init.ones_)
    projections = ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")
    for name, parameter in layer.named_parameters():
        part, _, kind = name.rpartition(".")
        if part in projections:
            assert (parameter == (1 if kind == "weight" else 0)).all(), name
        else:
            assert torch.equal(parameter, before[name]), name


def test_the_residual_stream_keeps_its_dtype_under_autocast():
    layer = randomise(AdaLNLayer(replace(CONFIG, qk_norm=True)), std=0.1)
    x, c = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, c, rotary())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x, c, rotary()), rtol=0.02, atol=0.05)


def test_a_stack_keeps_its_residual_stream_once():
    layers = [randomise(AdaLNLayer(CONFIG)) for _ in range(3)]
    order = [layers[i] for i in (0, 1, 1, 2)]  # a layer may come again
    (x, c), table = inputs(), rotary()

    def stored(function):
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return function(), sum(seen.values())

    def one_by_one():
        y = x
        for layer in order:
            y = layer(y, c, table)
        return y

    expected, many = stored(one_by_one)
    actual, once = stored(lambda: run_layers(order, x, c, table))
    assert torch.equal(actual, expected)
    assert many - once == 3 * x.nbytes


def test_empty_batch():
    layer = AdaLNLayer(CONFIG)
    assert layer(torch.empty(0, T, D), torch.empty(0, 7)).shape == (0, T, D)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm must be one of layer, rms, got batch"),
        ({"mlp": "relu"}, "mlp must be one of gelu, swiglu, got relu"),
        ({"num_heads": 5}, "dim must be a multiple of num_heads, got 12 and 5"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        AdaLNLayer(replace(CONFIG, **options))
