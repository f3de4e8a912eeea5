"""The evaluation of a text: the bound of its bits, and its bits under the sampler."""

from collections.abc import Sequence
from dataclasses import replace

from dbkernels.diffusion.bridges import DEFAULT_BRIDGE, BridgeName
from dbkernels.diffusion.process import Process
from dbkernels.models.registry import TextNoise
from dbkernels.settings import check_number
from dbkernels.training.text_bits import Reading, TextEvaluation, own_levels
from dbkernels.training.text_bound import gaussian_bits, levels_of, masked_bits
from dbkernels.training.text_sampler import passes_of_start, sampler_bits
from dbkernels.training.together import Together

WINDOWS = 512  # that are read where nobody says how many
SAMPLED = 8  # the sampler reads one window of so many: it takes starts times levels passes
STARTS = 32
MOST_STARTS = 10_000


def evaluate_text(
    blocks: Together,
    noise: TextNoise,
    text: Reading,
    *,
    levels: int | Sequence[float] | None = None,
    starts: int | None = None,
    bridge: BridgeName | None = None,
) -> TextEvaluation:
    """Bits per character of a text.

    Args:
        blocks:  in evaluation mode
        noise:   of the text
        text:    as it is read
        levels:  of the sampler, descending, or how many; None is what `own_levels` says
        starts:  of the sampler; None is STARTS, and 0 leaves the sampler out
        bridge:  of the sampler; None is DEFAULT_BRIDGE
    Raises:
        ValueError: a setting has a value that it cannot have.
    """
    if noise == "masked":
        return masked_bits(blocks, text)
    starts = STARTS if starts is None else starts
    check_number("starts", starts, 0, MOST_STARTS)
    found, text.passes.total = None, len(text) * sum(map(len, levels_of(blocks)))
    if starts:
        # first, for what it refuses
        grid = _grid(blocks.process, own_levels(len(list(blocks))) if levels is None else levels)
        some = replace(text, windows=-(-len(text) // SAMPLED))
        text.passes.total += len(some) * starts * passes_of_start(blocks, some, grid)
        found = sampler_bits(blocks, some, grid, starts=starts, name=bridge or DEFAULT_BRIDGE)
    return replace(gaussian_bits(blocks, text), sampler=found)


def _grid(process: Process, levels: int | Sequence[float]) -> Sequence[float]:
    if not isinstance(levels, int):
        return levels
    # one level asks once, at the most noise
    return [process.range.high] if levels == 1 else process.grid(levels, "cdf")
