"""The transformer as the study's first rows train it: in blocks, and end to end."""

import pytest
import torch
import torch.nn.functional as F
from baseline_case import DRAW, VIT, batch_of, loss_of, shaken

from dbkernels.models import FAMILIES
from dbkernels.models.vit import ViT
from dbkernels.training.run_config import PartitionConfig


class Six:
    """The samples of `batch_of`, alone."""

    def __len__(self):
        return 6

    def batch(self, indices, put=None):
        return batch_of()


def of_one_level(row, index):
    """The loss of a row's block as a few lines of torch."""
    blocks, model, batch = row.blocks, row.model, batch_of()
    block = blocks[index]
    quantiles = blocks.process.quantiles(DRAW, (6,), batch["image"].device)
    level = blocks.process.level_at(block.trained_noise, quantiles)
    logits = model.denoise(model.noisy(level, batch, DRAW), level, block.layers, batch)
    return F.cross_entropy(logits, batch["label"])


@pytest.mark.parametrize("name", ["diffusion blocks", "diffusion blocks, unconditioned"])
def test_blocks_of_the_transformer_are_those_of_a_run(make_baseline, name):
    row, batch = shaken(make_baseline("vit", name)), batch_of()
    entry, ends = FAMILIES["vit"], [block.noise for block in row.blocks]
    assert (row.blocks.process, row.blocks.weighting) == (entry.process, entry.weighting)
    assert [block.layers for block in row.blocks] == [(0,), (1,)]
    assert ends == [block.noise for block in PartitionConfig(2).of(ViT(VIT), entry.process, "none")]
    for block in row.blocks:
        torch.testing.assert_close(loss_of(row, block.index), of_one_level(row, block.index))
    # the answer is that of an evaluation
    assert row.levels == row.blocks.process.grid(3, "cdf")
    found = row.answer(batch, DRAW).argmax(1)
    expected = row.blocks.evaluate(Six()).metrics["accuracy"][-1]
    assert float((found == batch["label"]).float().mean()) == pytest.approx(expected)


def test_layers_without_conditioning_are_told_no_level_and_keep_the_scale_of_z(make_baseline):
    told, untold = (
        shaken(make_baseline("vit", name))
        for name in ("diffusion blocks", "diffusion blocks, unconditioned")
    )
    batch, low, high = batch_of(), torch.full((6,), 0.5), torch.full((6,), 50.0)
    for row, same in ((told, False), (untold, True)):
        conditions = [row.model.condition(level.log() / 4) for level in (low, high)]
        assert conditions[0].shape == (6, VIT.cond_dim)
        assert torch.equal(*conditions) == same == (not conditions[1].any())
        z = row.model.noisy(low, batch, DRAW)
        first = row.model.stem(z, low, batch["image"])[0][:, 0]
        c_in = (0.5**2 + low**2).rsqrt()[:, None]
        torch.testing.assert_close(first, c_in * z + row.model.positions[0])
        assert not torch.allclose(row.model.stem(z, high, batch["image"])[0][:, 0], first)
    frozen = [name for name, p in untold.blocks.named_parameters() if not p.requires_grad]
    assert frozen == [
        "model.layers.0.modulation.weight",
        "model.layers.1.modulation.weight",
        "model.modulation.linear.weight",
    ]
    # what is left has the same first weights
    first = dict(make_baseline("vit", told.name).blocks.named_parameters())
    for name, parameter in make_baseline("vit", untold.name).blocks.named_parameters():
        assert torch.equal(parameter, first[name]), name


def test_a_checkpointed_network_keeps_less_and_moves_only_rounding(make_baseline):
    kept, gradients = [], []
    for name in ("end to end", "end to end, checkpointed"):
        row, held = shaken(make_baseline("vit", name)), {}

        def keep(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(row)
        loss.backward()
        kept.append(sum(held.values()))
        gradients.append({n: p.grad for n, p in row.blocks.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0]
