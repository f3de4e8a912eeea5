"""NoProp-CT: one net that is told the time, and a noise schedule that is learned with it.

    SNR(t) = exp(-g(t)),    A(t) = sigmoid(-g(t)),    z_t ~ N(sqrt(A(t)) u_y, 1 - A(t))
    g(t)   = g_1 + (g_0 - g_1) (m(t) - m(0)) / (m(1) - m(0)),    g_1 > g_0, and m rises
    loss   = CE(read_out(z_1), y) + KL(q(z_0 | y) | N(0, 1))
             + ETA / 2 * SNR'(t) * |u_hat(z_t, image, t) - u_y|**2,    t ~ U(0, 1)

Li, Teh & Pascanu 2025 (arXiv:2503.24322), equation 9 and appendix B: 21.31 % on CIFAR-100. It is
not block-wise: every update runs the whole network.

Decisions. m(t) = w t + sum_k a_k sigmoid(b_k t + c_k) with positive w, a and b, whose slope is a
formula. SNR runs from exp(-5) to exp(5) at first, and g_1 = g_0 + softplus. An image is answered
along dz = u_hat d sqrt(A) + n d sqrt(1 - A), where n is the noise that u_hat leaves in z, by
Euler's steps at evenly spaced times, from z_0 ~ N(0, 1). A step is exact while u_hat stays.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.baseline import CNNConfig, Parts, Sizes, purpose
from baselines.noprop import TIME_WIDTH, NoProp, square_error
from baselines.noprop_dt import kl
from dbkernels.data.images import Batch, Data
from dbkernels.models.embed import NoiseEmbedding
from dbkernels.ops.philox import Draw, normals, uniforms
from dbkernels.settings import check_number
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block

ETA, FIRST, UNITS = 1.0, 5.0, 32
LAST_NOISE, LEVEL, TIME = range(3)  # purposes of a draw


class Timed(NoProp):
    """NoProp with one net that is told the time.

    Args:
        steps:  of an answer
    The others are those of `NoProp`.
    """

    def __init__(
        self, data: Data, seed: int, sizes: Sizes, *, embedding: int = 20, steps: int = 1000
    ):
        check_number("steps", steps, 1)
        super().__init__(data, seed, sizes, embedding=embedding)
        self.forwards = steps

    def one_net(self, sizes: Sizes, outputs: int) -> Parts:
        """The net, and the embedding of the time."""
        is_cnn = isinstance(sizes, CNNConfig)
        depth, cond_dim = (1, TIME_WIDTH) if is_cnn else (sizes.depth, sizes.cond_dim)
        model = Parts([self.net(sizes, depth, outputs, timed=True)], independent=True)
        model.time = NoiseEmbedding(cond_dim)
        return model

    def output(self, z: Tensor, image: Tensor, time: Tensor) -> Tensor:
        """Of the net, of z (B, width) at times (B,) in [0, 1]."""
        # in thousandths, for which the sinusoid's wavelengths are made
        return self.model.layers[0](z, image, self.model.time(1000 * time))


class NoPropCT(Timed):
    """One block."""

    name = "noprop-ct"

    def make(self, sizes: Sizes) -> DiffusionBlocks:
        model = self.one_net(sizes, self.num_classes)
        model.schedule = Schedule()
        return self.with_ends(model)

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        label, schedule = batch["label"], self.model.schedule
        u = self.embedded(label)
        time = uniforms(purpose(draw, TIME), len(u), device=u.device).float()
        ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device=u.device)
        signal, _ = schedule(time)
        first, last = torch.sigmoid(-schedule.g(ends)).unbind()
        z = blurred(u, signal[:, None], purpose(draw, LEVEL))
        z_1 = blurred(u, last, purpose(draw, LAST_NOISE))
        u_hat = self.estimate(self.output(z, batch["image"], time))
        weight = ETA / 2 * schedule.snr_slope(time)
        error = weight * square_error(u_hat, u)
        return F.cross_entropy(self.read_out(z_1), label) + (kl(u, first) + error).mean()

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        image, steps = batch["image"], int(self.forwards)
        z = normals(draw, len(image), self.width, image.device)
        times = torch.arange(steps + 1, dtype=torch.float32, device=image.device) / steps
        signal, noise = (each.sqrt() for each in self.model.schedule(times))
        for k in range(steps):
            u_hat = self.estimate(self.output(z, image, times[k].expand(len(image))))
            left = (z - signal[k] * u_hat) / noise[k]
            z = signal[k + 1] * u_hat + noise[k + 1] * left
        return self.read_out(z).softmax(-1)


class Schedule(nn.Module):
    """A learned noise schedule: (...) times in [0, 1] to A and 1 - A, shape of the times."""

    def __init__(self) -> None:
        super().__init__()
        self.least = nn.Parameter(torch.tensor(-FIRST, dtype=torch.float32))
        span = torch.tensor(2 * FIRST, dtype=torch.float32)
        self.span = nn.Parameter(span.expm1().log())  # softplus of it is the span
        # near a straight line at first
        self.line = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.heights, self.slopes, self.places = (
            nn.Parameter(each)
            for each in (
                torch.full((UNITS,), -5.0, dtype=torch.float32),
                torch.ones(UNITS, dtype=torch.float32),
                torch.randn(UNITS, dtype=torch.float32),
            )
        )

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        g = self.g(time)
        return torch.sigmoid(-g), torch.sigmoid(g)

    def g(self, time: Tensor) -> Tensor:
        """-ln SNR."""
        start, end = self._rising(torch.zeros_like(time)), self._rising(torch.ones_like(time))
        share = (self._rising(time) - start) / (end - start)
        return self.least + F.softplus(self.span) * (1 - share)

    def snr_slope(self, time: Tensor) -> Tensor:
        """SNR', which is positive."""
        start, end = self._rising(torch.zeros_like(time)), self._rising(torch.ones_like(time))
        slopes = F.softplus(self.slopes)
        s = torch.sigmoid(slopes * time[..., None] + self.places)
        slope = F.softplus(self.line) + (F.softplus(self.heights) * slopes * s * (1 - s)).sum(-1)
        return F.softplus(self.span) * slope / (end - start) * (-self.g(time)).exp()

    def _rising(self, time: Tensor) -> Tensor:
        s = torch.sigmoid(F.softplus(self.slopes) * time[..., None] + self.places)
        return F.softplus(self.line) * time + (F.softplus(self.heights) * s).sum(-1)


def blurred(u: Tensor, signal: Tensor, draw: Draw) -> Tensor:
    """As `noisy` of a signal () or (B, 1), whose gradient passes too."""
    return signal.sqrt() * u + (1 - signal).sqrt() * normals(draw, *u.shape, u.device)
