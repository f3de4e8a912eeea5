from types import SimpleNamespace

import pytest
import torch
from training.tiny import PRIOR, make_data, make_models

from dbkernels.diffusion.gaussian import sigma_at
from dbkernels.diffusion.precondition import edm_weight, mean_edm_weight
from dbkernels.ops.philox import Draw, uniforms
from dbkernels.training.objective import WEIGHTINGS, gaussian_step, weigh

LOSSES = torch.tensor([1.0, 2.0, 6.0])
WEIGHT = torch.tensor([4.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("none", 3.0),
        ("edm", (4 + 2 + 3) / 3),
        ("normalised", (4 + 2 + 3) / 3 / 8),
        ("published", 3.0 * 5.5 / 3),
    ],
)
def test_weightings(weighting, expected):
    assert weigh(LOSSES, WEIGHT, weighting, 8.0).item() == pytest.approx(expected)


def test_rejects_an_unknown_weighting():
    with pytest.raises(ValueError, match=r"weighting must be one of none, .*, got soft"):
        weigh(LOSSES, WEIGHT, "soft", 8.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_step_weighs_the_losses_of_the_levels_that_it_drew(weighting):
    block = make_models().blocks[1]
    seen = SimpleNamespace()

    def losses(draw, level, layers, batch):
        seen.draw, seen.level, seen.layers, seen.batch = draw, level, layers, batch
        return level

    model, batch, draw = SimpleNamespace(losses=losses), {"label": torch.zeros(512)}, Draw(3, 4, 5)
    loss = gaussian_step(
        model, block, batch, draw, prior=PRIOR, weighting=weighting, sigma_data=0.5
    )
    noise = block.trained_noise
    assert seen.draw is draw and seen.batch is batch
    assert torch.equal(seen.level, sigma_at(PRIOR, noise, uniforms(draw, 512)))
    assert seen.layers == block.layers
    assert noise.low <= seen.level.min() and seen.level.max() <= noise.high
    assert seen.level.min() < block.noise.low and seen.level.max() > block.noise.high
    mean = mean_edm_weight(PRIOR, noise, 0.5)
    expected = weigh(seen.level, edm_weight(seen.level, 0.5), weighting, mean)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("family", ["vit", "dit"])
def test_gradient_reaches_the_block_and_what_is_shared_alone(family):
    models = make_models(family)
    block = models.blocks[1]
    batch = make_data().batch(torch.arange(4))
    # away from the zero start, where the gates let nothing through
    for parameter in models.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    gaussian_step(
        models.model, block, batch, Draw(0, 0), prior=PRIOR, weighting="none", sigma_data=0.5
    ).backward()
    for name, parameter in models.named_parameters():
        reached = "layers." not in name or "layers.1." in name
        assert (parameter.grad is not None) == reached, name
        assert not reached or parameter.grad.abs().max() > 0, name
