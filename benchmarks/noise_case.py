"""The two ends of a training step, and who runs them: the noise before the network, the loss after.

Eager torch is what the published code of Karras et al. 2022 does: the noise, the noised target and
its scaled copy before; the denoised output, its error, the square and their gradients after.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels import ops
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.prediction import EDM
from dbkernels.models.compiled import compiled

SIGMA_DATA = 0.5
PREDICTION = EDM(SIGMA_DATA)
SHAPES = ((256, 4, 32, 32), (256, 256, 384))  # latents, and tokens
PASSES = {  # over a tensor of z0's shape, of what each op must read and write
    "add_noise": 2,
    "score_loss": 3,  # the prediction and z0, and the gradient
    "noise_and_loss": 5,
}


class NoiseCase(NamedTuple):
    """One op on one shape, forward and backward together: the forward computes the gradient."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    impls: tuple[str, ...]
    device: torch.device

    directions = ("fwd+bwd",)

    @property
    def dtype_name(self) -> str:
        """As a row has it."""
        return str(self.dtype).removeprefix("torch.")

    def inputs(self) -> list[Tensor]:
        """z0, sigma and what a network answers, the last with a gradient."""
        # drawn where they are needed: on a host it takes longer than all that is timed
        random = torch.Generator(self.device).manual_seed(0)
        place = {"generator": random, "device": self.device}
        z0 = 0.5 * torch.randn(self.shape, dtype=self.dtype, **place)
        u = torch.rand(len(z0), dtype=torch.float64, **place)
        sigma = LogNormal().level_at(LogNormal().range, u)
        prediction = torch.randn(self.shape, dtype=self.dtype, **place)
        return [z0, sigma, prediction.requires_grad_()]

    def calls(
        self, inputs: Sequence[list[Tensor]]
    ) -> dict[tuple[str, str], list[Callable[[], object]]]:
        """By implementation and direction, a call for each copy of the inputs."""
        return {(impl, "fwd+bwd"): self._calls(impl, inputs) for impl in self.impls}

    def _calls(self, impl: str, inputs: Sequence[list[Tensor]]) -> list[Callable[[], object]]:
        draw = draw_on(self.device)
        fused = partial(_noise, draw), partial(_loss, draw)
        noise, loss = {"fused": fused}.get(impl, (_eager_noise, _eager_loss))
        if impl == "compiled":
            noise, loss = compiled(noise, {}), compiled(loss, {})

        def call(z0: Tensor, sigma: Tensor, prediction: Tensor) -> object:
            # the loss needs z, which eager torch has kept and the fused one draws again
            scaled, z = (None, z0) if self.op == "score_loss" else noise(z0, sigma)
            if self.op == "add_noise":
                return scaled
            return scaled, torch.autograd.grad(loss(prediction, z, z0, sigma), prediction)

        return [partial(call, *each) for each in inputs]

    def bytes_moved(self, direction: str) -> int:
        return PASSES[self.op] * prod(self.shape) * self.dtype.itemsize

    def implementation(self, impl: str, direction: str) -> str:
        """What computes."""
        op = "add_noise_fwd" if self.op == "add_noise" else "score_loss_fwd"
        return what_runs(impl, op, self.device)


def what_runs(impl: str, op: str, device: torch.device) -> str:
    """What computes an op, such as gelu_fwd, for one of those who are compared."""
    fused = ops.implementation(device, op)
    return {"fused": fused, "compiled": "inductor", "eager": "torch"}[impl]


def draw_on(device: torch.device) -> ops.Draw:
    """The step in the device's memory, as where a CUDA graph is replayed with the next."""
    return ops.Draw(seed=1, step=torch.tensor(7, device=device))


def _noise(draw: ops.Draw, z0: Tensor, sigma: Tensor) -> tuple[Tensor, None]:
    return ops.add_noise(z0, *PREDICTION.input(sigma), draw), None


def _loss(draw: ops.Draw, prediction: Tensor, z: None, z0: Tensor, sigma: Tensor) -> Tensor:
    return ops.score_loss(prediction, z0, *PREDICTION.target(sigma), draw)[0]


def _eager_noise(z0: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    level = sigma.view(-1, *[1] * (z0.dim() - 1))
    z = z0 + level * torch.randn_like(z0)
    return (PREDICTION.input(level)[0] * z).to(z0.dtype), z


def _eager_loss(prediction: Tensor, z: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
    level = sigma.view(-1, *[1] * (z0.dim() - 1))
    of_z, of_F = PREDICTION.estimate(level)
    weight = LogNormal().weight(level, SIGMA_DATA)
    return (weight * (of_z * z + of_F * prediction - z0).square()).mean()
