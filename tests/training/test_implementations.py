"""One training run on every implementation: it is the same run."""

import pytest
from implementations import implementations
from training.tiny import make_trainer

from dbkernels.ops import use_implementation


def loss_curve(family, name, **config):
    trainer = make_trainer(family, **config)
    with use_implementation(name):
        return [trainer.step_block(trainer.blocks[step % 3])["loss"] for step in range(4)]


@pytest.mark.parametrize("family", ["vit", "dit"])
def test_the_loss_curve_is_that_of_plain_torch(family):
    names = set(implementations("adaln_norm_fwd")) & set(implementations("add_noise_fwd"))
    expected = loss_curve(family, "torch")
    assert len(set(expected)) == len(expected)
    for name in names - {"torch"}:
        assert loss_curve(family, name) == pytest.approx(expected, rel=1e-4), name
