"""The network of NoProp: one of its small nets, or the whole of its continuous variants.

    i      = FC(conv 3x3, norm, ReLU, pool, dropout; three times)    of the image
    h      = FC(z),    e = ReLU(W h + b) + h                         of the noisy embedding
    k      = FC(c)                                                   of the time, if there is one
    output = W FC(FC([i, e, k])) + b

where FC is a linear map, a norm and ReLU.

Li, Teh & Pascanu 2025 (arXiv:2503.24322), figure 6, as far as it is known here: channels 32, 64
and 128, branches of 256, then 256 and 128 before the outputs.

Decisions. Its discrete variant has batch norm and its continuous ones have none. Here group norm
and layer norm stand in the place of batch norm: a block's running statistics are in no checkpoint,
and an answer is to be a function of its own image. Pooling is by 2, of the largest. The time
reaches the network as an embedding that the model makes, followed by a layer of this branch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.baseline import CNNConfig

GROUPS = 8  # of the group norm, or as many as divide the channels


class CNN(nn.Module):
    """z (B, width), image (B, C, H, W) and c (B, cond_dim) or None -> (B, outputs).

    Args:
        config:       sizes
        image_shape:  (C, H, W)
        width:        of the noisy embedding
        outputs:      numbers that it gives
        cond_dim:     width of the embedding of the time; 0 has none
        normed:       whether there are norms
    Raises:
        ValueError: the image is smaller than the pools.
    """

    def __init__(
        self,
        config: CNNConfig,
        image_shape: tuple[int, int, int],
        width: int,
        outputs: int,
        *,
        cond_dim: int = 0,
        normed: bool = False,
    ):
        super().__init__()
        channels, side, hidden = image_shape[0], image_shape[1], config.hidden
        if side < 2 ** len(config.channels):
            raise ValueError(
                f"images must have {2 ** len(config.channels)} pixels to a side or more, got {side}"
            )
        convolutions: list[nn.Module] = []
        for each in config.channels:
            convolutions += [nn.Conv2d(channels, each, 3, padding=1)]
            groups = max(g for g in range(1, GROUPS + 1) if each % g == 0)
            convolutions += [nn.GroupNorm(groups, each)] if normed else []
            convolutions += [nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(config.dropout)]
            channels, side = each, side // 2

        def full(inputs: int, count: int) -> nn.Sequential:
            norm = [nn.LayerNorm(count)] if normed else []
            return nn.Sequential(nn.Linear(inputs, count), *norm, nn.ReLU())

        self.image = nn.Sequential(*convolutions, nn.Flatten(), full(channels * side**2, hidden))
        self.first, self.second = full(width, hidden), nn.Linear(hidden, hidden)
        self.time = full(cond_dim, hidden) if cond_dim else None
        branches = 3 if cond_dim else 2
        self.out = nn.Sequential(
            full(branches * hidden, hidden),
            full(hidden, hidden // 2),
            nn.Linear(hidden // 2, outputs),
        )

    def forward(self, z: Tensor, image: Tensor, c: Tensor | None) -> Tensor:
        h = self.first(z)
        parts = [self.image(image), F.relu(self.second(h)) + h]
        if self.time is not None:
            parts.append(self.time(c))
        return self.out(torch.cat(parts, dim=1))
