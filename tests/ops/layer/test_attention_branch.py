import pytest
import torch
from ops.one_layer import OneLayer

from dbkernels.ops import reference
from dbkernels.ops.layer.branches import attend, attend_backward
from dbkernels.ops.layer.projection import QKV, Gradients

B, T, D, H = 2, 5, 24, 3
ATTENTION_WEIGHTS = ("out_weight", "out_bias", "q_weight", "k_weight")
STEPS = [
    {"qk_norm": qk_norm, "rotated": rotated} for qk_norm in (0, 1) for rotated in (False, True)
]


class Branch:
    """Weights and the tensors around the attention of one layer, with queries of some tokens."""

    def __init__(self, *, std=1.0, num_queries=None, **options):
        layer = OneLayer(B, T, D, H, dtypes=(torch.float64,) * 3, **options)
        self.w, self.rotary = layer.weights, layer.options["rotary"]
        self.whole = std * torch.randn(B, T, 3 * D, dtype=torch.float64)
        self.num_queries, self.qkv = num_queries, QKV(None, self.whole)
        if num_queries is not None:
            q, kv = self.whole[:, :num_queries, :D], self.whole[..., D:]
            self.qkv = QKV(q.contiguous(), kv.contiguous())
        self.da = torch.randn(B, num_queries or T, D, dtype=torch.float64)
        self.wanted = [name for name in ATTENTION_WEIGHTS if getattr(self.w, name) is not None]

    def attend(self):
        return attend(self.qkv, H, self.w, self.rotary)

    def backward(self, attended, logsumexp, *, dqkv=None, wanted=None):
        gradients = Gradients(frozenset(self.wanted if wanted is None else wanted), torch.float64)
        if dqkv is None:
            dqkv = QKV(*(None if t is None else torch.empty_like(t) for t in self.qkv))
        attend_backward(
            self.da, self.qkv, attended, logsumexp, H, self.w, self.rotary,
            dqkv=dqkv, gradients=gradients,
        )  # fmt: skip
        return dqkv.whole(), gradients.sums

    def exact(self):
        """attended, dqkv and the weights' gradients, by autograd."""
        leaves = {"qkv": self.whole, **{name: getattr(self.w, name) for name in self.wanted}}
        leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        q, k = reference.qk_norm_rotary(
            leaves["qkv"], H, q_weight=leaves.get("q_weight"), k_weight=leaves.get("k_weight"),
            rotary=self.rotary,
        )  # fmt: skip
        v = leaves["qkv"].unflatten(-1, (3, H, -1))[:, :, 2]
        attended = reference.attention(q, k, v).flatten(2)[:, : self.num_queries]
        a = attended @ leaves["out_weight"].T + leaves.get("out_bias", 0)
        grads = torch.autograd.grad(a, list(leaves.values()), self.da)
        return attended.detach(), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("num_queries", [None, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_agrees_with_autograd(steps, bias, num_queries):
    branch = Branch(bias=bias, num_queries=num_queries, **steps)
    attended, logsumexp = branch.attend()
    expected, grads = branch.exact()
    torch.testing.assert_close(attended, expected)
    dqkv, sums = branch.backward(attended, logsumexp)
    torch.testing.assert_close(dqkv, grads.pop("qkv"))
    assert sums.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(sums[name], grad)


@pytest.mark.parametrize("num_queries", [None, 2])
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_the_attention_is_computed_again_where_it_was_not_kept(steps, num_queries):
    branch = Branch(num_queries=num_queries, **steps)
    dqkv, sums = branch.backward(*branch.attend())
    again, sums_again = branch.backward(None, None)
    assert torch.equal(again, dqkv)
    for name, grad in sums.items():
        assert torch.equal(sums_again[name], grad)


@pytest.mark.parametrize("num_queries", [None, 2])
@pytest.mark.parametrize("rotated", [False, True])
def test_without_a_norm_the_gradient_may_be_written_over_qkv(rotated, num_queries):
    branch = Branch(qk_norm=False, rotated=rotated, num_queries=num_queries)
    attended = branch.attend()
    dqkv, _ = branch.backward(*attended)
    over, _ = branch.backward(*attended, dqkv=branch.qkv)
    assert torch.equal(over, dqkv) and torch.equal(branch.qkv.whole(), dqkv)


@pytest.mark.parametrize("wanted", [(), *[(name,) for name in ATTENTION_WEIGHTS]], ids=str)
def test_only_what_is_wanted_is_summed(wanted):
    branch = Branch()
    attended = branch.attend()
    dqkv, every = branch.backward(*attended)
    same, sums = branch.backward(*attended, wanted=wanted)
    assert torch.equal(same, dqkv) and sums.keys() == set(wanted)
    for name in wanted:
        assert torch.equal(sums[name], every[name])


def test_the_norms_of_small_queries_and_keys_feel_eps():
    branch = Branch(std=1e-3)
    attended, logsumexp = branch.attend()
    expected, grads = branch.exact()
    torch.testing.assert_close(attended, expected)
    torch.testing.assert_close(branch.backward(attended, logsumexp)[0], grads["qkv"])


def test_values_are_neither_normalised_nor_turned():
    branch = Branch(rotated=True)
    branch.whole[..., 2 * D :] = 7.0
    torch.testing.assert_close(branch.attend()[0], torch.full((B, T, D), 7.0).double())
