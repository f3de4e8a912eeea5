"""What families that denoise an image share: their loss and the estimate, whatever conditions them.

    estimate of z0 = of_z * z + of_F * F,    loss = weight * mean (F - (alpha z0 + beta noise))^2

The coefficients are those of a `Prediction`. A family gives the network F.
"""

import abc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.prediction import Prediction, prediction_named
from dbkernels.diffusion.process import Interval
from dbkernels.models import embed
from dbkernels.models.family import Presets
from dbkernels.models.taught import square_error
from dbkernels.ops import reference
from dbkernels.ops.adaln_norm import adaln_norm
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.philox import Draw
from dbkernels.ops.score_loss import score_loss


def scored(
    network: Callable[[Tensor], Tensor],
    prediction: Prediction,
    z0: Tensor,
    draw: Draw,
    level: Tensor,
    scale: Tensor,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Errors of the estimates that a network gives of clean targets.

    Args:
        network:  what the prediction makes of z, (B, ...), to F
        z0:       (B, ...)
        draw:     names the noise
        level:    (B,)
        scale:    (B,) float64
        inplace:  as that of `score_loss`
    Returns:
        Sum of scale times the mean squared error of each sample, and these times scale, (B,),
        which have no gradient.
    """
    # each is rounded once, from float64: else its errors add up to those of the loss
    exact = level.double()
    # an error of the estimate is of_F times one of F
    weight = (scale * prediction.estimate(exact)[1].square()).float()
    p, q, alpha, beta = (
        each.float() for each in (*prediction.input(exact), *prediction.target(exact))
    )
    how = {"weight": weight, "reduction": "sum", "inplace": inplace}
    return score_loss(network(add_noise(z0, p, q, draw)), z0, alpha, beta, draw, **how)


class ImageDenoiser(Presets, nn.Module, abc.ABC):
    """A family whose target is an image or latent (B, C, H, W), cut into patches.

    A subclass makes `modulation`, a `FinalModulation`, and `head`, to the numbers of a patch.

    Args:
        config:  with sigma_data, process, prediction, patch and channels
    """

    target_parts = ()
    stem_and_head = ("stem", "tail")
    independent = True

    def __init__(self, config):
        super().__init__()
        self.config, self.sigma_data = config, config.sigma_data
        self.prediction = prediction_named(config.process, config.prediction, config.sigma_data)

    @abc.abstractmethod
    def network(self, scaled: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """F of what the prediction makes of z, (B, C, H, W), at the levels (B,)."""

    def target(self, batch: Batch) -> Tensor:
        """The image itself, (B, C, H, W)."""
        return batch["image"]

    def denoise(self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """The denoised image (B, C, H, W) from z at the levels (B,), given its condition."""
        prediction, wide = self.prediction, level[:, None, None, None]
        of_z, of_F = prediction.estimate(wide)
        return of_z * z + of_F * self.network(prediction.scale(wide) * z, level, layers, batch)

    def loss(
        self,
        draw: Draw,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
        interval: Interval,
    ) -> Tensor:
        """Sum of scale (B,) times the mean squared error of each denoised image."""
        return self._score(draw, level, scale, layers, batch)[0]

    def losses(self, draw: Draw, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Squared error of the denoised image, mean over the elements of each sample, (B,)."""
        return self._score(draw, level, torch.ones_like(level).double(), layers, batch)[1]

    def noisy(self, level: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """z (B, C, H, W) of the images themselves."""
        return add_noise(batch["image"], *self.prediction.path(level), draw)

    def taught_loss(
        self,
        z: Tensor,
        taught: Tensor,
        share: float,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
    ) -> Tensor:
        """Sum of scale (B,) times the mean squared error, of which a share is of what is taught."""
        estimate = self.denoise(z, level, layers, batch)
        return (scale.float() * square_error(estimate, taught, batch["image"], share)).sum()

    def _score(
        self, draw: Draw, level: Tensor, scale: Tensor, layers: Sequence[int], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Sum of the samples' weighted errors, and the errors (B,), which have no gradient."""

        def network(scaled: Tensor) -> Tensor:
            return self.network(scaled, level, layers, batch)

        # no head here needs its own output again
        return scored(network, self.prediction, batch["image"], draw, level, scale, inplace=True)

    def tail(self, x: Tensor, c: Tensor) -> Tensor:
        """F (B, C, H, W) of what the last layer left, (B, T, D), and the condition."""
        shift, scale = self.modulation.parts(c)
        if torch.compiler.is_exporting():  # as a layer does
            y = reference.adaln_norm(x, scale, shift).to(scale.dtype)
        else:
            y = adaln_norm(x, scale, shift, dtype=scale.dtype)
        F = self.head(y)
        return embed.unpatchify(F, self.config.patch, self.config.channels)

    def estimate(self, prediction: Tensor) -> Tensor:
        """The prediction is the estimate."""
        return prediction
