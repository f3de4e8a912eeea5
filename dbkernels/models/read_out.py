"""From what the last layer left to logits over the words, of a token that was noisy or never was.

    D      = of_z z + of_F rms(h),                logits = W ((1 + scale) D + shift) + b      paper
    logits = W ((1 + scale) rms(h) + shift) + b + z E^^T / sigma**2                      posterior
    logits = W ((1 + scale) rms(h) + shift) + b                                   of a clean token

E^ has the words' embeddings as unit rows, of_z and of_F are those of `prediction.EDM`. The second
form is Bayes' rule: for unit rows ln p(k | z, x) = ln q(k | x) + z . e_k / sigma**2 but for a
constant, so the network has only to learn what the context x tells.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.diffusion.prediction import EDM
from dbkernels.models.branches import initialise_linear
from dbkernels.models.embed import FinalModulation
from dbkernels.models.layer import make_norm
from dbkernels.models.text import NoisyTextConfig
from dbkernels.ops import reference
from dbkernels.ops.adaln_norm import adaln_norm
from dbkernels.ops.backend.checks import Reduction, statistics_dtype
from dbkernels.ops.linear_cross_entropy import linear_cross_entropy


class ReadOutHead(nn.Module):
    """The last norm, its modulation and the head, which starts at zero.

    Rows are what the head multiplies: (B, S, dim), or (B, S, 2 dim) where they hold z too.
    """

    def __init__(self, config: NoisyTextConfig):
        super().__init__()
        self.reads_z = config.read_out == "posterior"
        self.prediction = EDM(config.sigma_data)
        self.norm = make_norm(config.layer())
        self.modulation = FinalModulation(config.dim, config.cond_dim)
        # a bias knows how frequent the words are from the first step on
        self.linear = nn.Linear(config.dim, config.vocabulary)
        initialise_linear(self.linear, nn.init.zeros_)

    def noisy(self, h: Tensor, c: Tensor, z: Tensor, level: Tensor) -> Tensor:
        """Rows of a noisy stream h (B, S, dim) with condition c, from z at levels (B,) or
        (B, S)."""
        level = per_token(level)
        if self.reads_z:
            return torch.cat([self._normed(h, c).to(z.dtype), z / level.square()], dim=-1)
        (of_z, of_F), (shift, scale) = self.prediction.estimate(level), self._modulation(c)
        return (1 + scale) * (of_z * z + of_F * self.norm(h)) + shift

    def clean(self, h: Tensor, c: Tensor) -> Tensor:
        """Rows (B, S, dim) of a stream h of clean tokens, which have no z."""
        return self._normed(h, c)

    def beside(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """Rows of both streams, one after the other along B, for one pass of the head."""
        missing = noisy.shape[-1] - clean.shape[-1]
        return torch.cat([noisy, F.pad(clean, (0, missing)) if missing else clean])

    def logits(self, rows: Tensor, table: Tensor | None) -> Tensor:
        """(B, S, vocabulary) from rows and E^, as for `cross_entropy`."""
        with self._wide(rows):
            weight, bias = self._weight(rows, table), self.linear.bias
            return F.linear(rows, weight.to(rows.dtype), bias.to(rows.dtype))

    def cross_entropy(
        self,
        rows: Tensor,
        token: Tensor,
        table: Tensor | None,
        scale: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Cross-entropy of the logits in nats, () or of each token (B, S).

        Args:
            rows:       of this head
            token:      (B, S)  int64
            table:      E^ (vocabulary, dim); None where no row holds z
            scale:      (B, S) factor of each token's; None is 1
            reduction:  as that of `linear_cross_entropy`
        """
        with self._wide(rows):
            how = {"bias": self.linear.bias, "token_weight": scale, "reduction": reduction}
            return linear_cross_entropy(rows, self._weight(rows, table), token, **how)

    def _modulation(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale (B, 1 or S, dim)."""
        return self.modulation.parts(c if c.dim() == 3 else c[:, None])

    def _normed(self, h: Tensor, c: Tensor) -> Tensor:
        """(1 + scale) rms(h) + shift, in at least float32."""
        shift, scale = self.modulation.parts(c)
        told = {"norm": "rms", "eps": self.norm.eps}
        if torch.compiler.is_exporting():  # as a layer does
            return reference.adaln_norm(h, scale, shift, **told)
        return adaln_norm(h, scale, shift, **told, dtype=statistics_dtype(h))

    def _weight(self, rows: Tensor, table: Tensor | None) -> Tensor:
        own = self.linear.weight
        return torch.cat([own.float(), table.float()], dim=1) if self._holds_z(rows) else own

    def _holds_z(self, rows: Tensor) -> bool:
        return rows.shape[-1] > self.linear.in_features

    def _wide(self, rows: Tensor) -> AbstractContextManager:
        # z / sigma**2 reaches hundreds, of which a narrow dtype would leave no logit right
        device = rows.device.type
        narrow = self._holds_z(rows) and torch.is_autocast_enabled(device)
        # nothing where nothing changes, for an exported program shows every context
        return torch.autocast(device, enabled=False) if narrow else nullcontext()


def per_token(level: Tensor) -> Tensor:
    """Levels (B,) or (B, S) as what multiplies (B, S, dim)."""
    return level[..., None] if level.dim() == 2 else level[:, None, None]
