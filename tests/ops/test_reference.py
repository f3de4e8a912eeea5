"""The specification against the formulas of its papers, where no layer of torch has them too.

Its norms, gates and activations are those of a whole layer, which `models/test_layer` compares
with torch's own modules.
"""

import math

import pytest
import torch
from ops.one_layer import OneLayer
from torch.nn.attention import SDPBackend, sdpa_kernel

from dbkernels.ops import reference

EPS = 0.1


def rms_norm(row):
    return [value / math.sqrt(sum(x**2 for x in row) / len(row) + EPS) for value in row]


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_queries_and_keys_are_normalised_by_head_and_then_turned():
    qkv, q_weight, k_weight = tokens(1, 3, 3 * 2 * 4), tokens(4), tokens(4)
    angles = tokens(3, 2).repeat(1, 2)
    norms = {"q_weight": q_weight, "k_weight": k_weight, "eps": EPS}
    table = torch.stack([angles.cos(), angles.sin()])
    results = reference.qk_norm_rotary(qkv, 2, rotary=table, **norms)
    for part, (actual, weight) in enumerate(zip(results, (q_weight, k_weight), strict=True)):
        row = rms_norm(qkv.view(3, 3, 2, 4)[2, part, 1].tolist())
        turned = complex(weight[1] * row[1], weight[3] * row[3])
        turned *= complex(angles[2, 1].cos(), angles[2, 1].sin())
        assert actual[0, 2, 1, 1::2].tolist() == pytest.approx([turned.real, turned.imag])


def test_the_branches_of_a_layer_run_in_the_dtype_of_the_weights():
    layer = OneLayer(mlp="swiglu", rotated=True, dtypes=(torch.float32, *[torch.bfloat16] * 2))
    y = layer.run(layer.tensors, reference.adaln_layer)
    assert y.dtype == torch.float32
    exact = layer.exact()["out"]
    assert 1e-4 < (y - exact).abs().max() < 0.2


def test_a_layer_has_a_second_derivative():
    layer = OneLayer(1, 2, 2, 1, hidden=2, mlp="swiglu", dtypes=(torch.float64,) * 3)
    names, values = list(layer.tensors), list(layer.leaves().values())

    def f(*values):
        return layer.run(dict(zip(names, values, strict=True)), reference.adaln_layer)

    # torch's fused attention has none of its own
    with sdpa_kernel(SDPBackend.MATH):
        torch.autograd.gradgradcheck(f, values)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_cross_entropy_is_over_the_tokens_that_count(weighted):
    x, weight, bias, target = tokens(1, 3, 4), tokens(5, 4), tokens(5), torch.tensor([[4, -100, 0]])
    token_weight = torch.tensor([[0.5, 7.0, 2.0]]).double() if weighted else None
    logits = (x[0] @ weight.T + bias).exp()
    nll = [-math.log(logits[n, label] / logits[n].sum()) for n, label in ((0, 4), (2, 0))]
    first, last = nll[0] * (0.5 if weighted else 1), nll[1] * (2 if weighted else 1)
    expected = {"none": [[first, 0, last]], "sum": first + last, "mean": (first + last) / 2}
    options = {"bias": bias, "token_weight": token_weight}
    for reduction, value in expected.items():
        loss = reference.linear_cross_entropy(x, weight, target, **options, reduction=reduction)
        torch.testing.assert_close(loss, torch.tensor(value, dtype=torch.float64))


@pytest.mark.parametrize("per_token", [False, True])
def test_a_noisy_target_has_its_sample_s_or_its_token_s_coefficients(per_token):
    (z0, noise), at = tokens(2, 2, 3, 4), (1, 2)[: 1 + per_token]
    p, q = tokens(2, *(2, 3)[: len(at)])
    z = reference.add_noise(z0, p, q, noise)
    assert z[1, 2, 3] == p[at] * z0[1, 2, 3] + q[at] * noise[1, 2, 3]


@pytest.mark.parametrize("masked", [False, True])
def test_with_coefficients_of_edm_the_score_loss_is_the_weighted_error_of_the_denoiser(masked):
    prediction, z0, noise = tokens(3, 2, 3, 4)
    sigma, s_data, weight = tokens(2).exp(), 0.3, torch.tensor([0.5, 2.0], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]]) if masked else None
    root = (sigma**2 + s_data**2).sqrt()
    alpha, beta, c_out = sigma / (s_data * root), -s_data / root, sigma * s_data / root
    loss, losses = reference.score_loss(
        prediction, z0, alpha, beta, noise, weight=weight * c_out**2, mask=mask
    )
    counts = torch.ones(2, 3, dtype=torch.bool) if mask is None else mask
    expected = []
    for b, (s, r) in enumerate(zip(sigma.tolist(), root.tolist(), strict=True)):
        denoised = (s_data / r) ** 2 * (z0[b] + s * noise[b]) + c_out[b] * prediction[b]
        expected.append(weight[b] * (denoised - z0[b]).square()[counts[b]].mean())
    torch.testing.assert_close(losses, torch.stack(expected))
    torch.testing.assert_close(loss, losses.mean())


def test_the_weight_of_a_token_is_that_of_its_elements_in_the_mean():
    prediction, z0, noise, (a, b, weight) = *tokens(3, 2, 3, 4), tokens(3, 2, 3)
    mask = torch.tensor([[True, True, False], [False] * 3])
    loss, losses = reference.score_loss(
        prediction, z0, a, b, noise, weight=weight, mask=mask, reduction="sum"
    )
    error = (prediction[0] - a[0, :, None] * z0[0] - b[0, :, None] * noise[0]) ** 2
    expected = (error[0].mean() * weight[0, 0] + error[1].mean() * weight[0, 1]) / 2
    torch.testing.assert_close(losses, torch.stack([expected, torch.zeros_like(expected)]))
    torch.testing.assert_close(loss, expected)
