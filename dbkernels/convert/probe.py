"""A block and the layer that was read of it, run once and compared.

What stands in a block's own forward no part shows, such as rotary positions or another order of the
branches. So both run in float64, with other weights and with the same elements left out.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dbkernels.convert.read_block import DROPOUTS, TOLERANCE
from dbkernels.models.layer import AdaLNLayer
from dbkernels.ops import Draw, dropout

TOKENS = 4  # of the samples that a block and its layer both compute; a square, as some ask for
SHARE = 0.5  # of what both leave out where the block leaves out any: a small share may leave all
DRAW = Draw(seed=0, step=0)


class _Drawn(nn.Dropout):
    """A dropout of a block, its hooks too, that leaves out what a layer does at the same place."""

    def __init__(self, dropout: nn.Module, place: int, batch: int):
        super().__init__()
        self.__dict__.update(vars(dropout))
        self.place, self.batch, self.ran = place, batch, False

    def forward(self, x: Tensor) -> Tensor:
        self.ran = True
        if self.place:
            return dropout(x, SHARE, DRAW, place=self.place)
        weights = x.reshape(self.batch, -1, TOKENS, TOKENS).transpose(1, 2)  # by query
        return dropout(weights, SHARE, DRAW).transpose(1, 2).reshape(x.shape)


def check_computes_the_same(block: nn.Module, convert: Callable[[nn.Module], AdaLNLayer]) -> None:
    """Run a copy of a block with random weights, and the layer that is made of the copy.

    Raises:
        ValueError: the block does not run as block(x, c), its output is another one, or it has a
            dropout that its forward does not run.
    """
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        probe = _randomised(block, random)
        layer = convert(probe)
        dim, cond_dim = layer.config.dim, layer.config.cond_dim
        # a variance that shows the eps of a norm
        x, c = 0.1 * _normal(random, 2, TOKENS, dim) + 0.2, _normal(random, 2, cond_dim)
        drawn = _draw(probe, len(x))
        try:
            expected = probe(x.clone(), c).view_as(x)
        except Exception as error:
            raise ValueError(f"a DiT block must run as block(x, c), got {error!r}") from error
        difference = (layer(x, c, draw=DRAW) - expected).abs().max() / expected.abs().max()
    for name, module in drawn.items():
        if not module.ran:
            raise ValueError(f"{name} must run in the forward of its block, got one that does not")
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the forward of {type(block).__name__} must compute what its parts say, which is "
            f"{layer.config}, got an output that differs by {float(difference):.1e} of its size"
        )


def _normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64)


def _randomised(block: nn.Module, random: torch.Generator) -> nn.Module:
    """A copy in training, with random weights and a share to leave out that is never small."""
    probe = copy.deepcopy(block).to("cpu", torch.float64).train()
    for parameter in probe.parameters():
        # each branch and each gate of the size of the stream
        normal = _normal(random, *parameter.shape)
        parameter.copy_(normal * parameter.shape[-1] ** -0.5 + 0.1)
    for name in _dropping(probe):
        probe.get_submodule(name).p = SHARE
    return probe


def _draw(probe: nn.Module, batch: int) -> dict[str, _Drawn]:
    """Put a module in the place of each dropout; they by name."""
    drawn = {
        name: _Drawn(probe.get_submodule(name), place, batch)
        for name, place in _dropping(probe).items()
    }
    for name, module in drawn.items():
        probe.set_submodule(name, module)
    return drawn


def _dropping(block: nn.Module) -> dict[str, int]:
    """The places of a layer's dropout where a block leaves out something."""
    modules = dict(block.named_modules(remove_duplicate=False))
    found = ((name, place, modules.get(name)) for place, name in enumerate(DROPOUTS))
    return {name: place for name, place, module in found if getattr(module, "p", 0) != 0}
