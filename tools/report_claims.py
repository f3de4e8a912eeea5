"""What studies are expected to show, by the paper or by this library, and whether they did."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from report_rows import Row
from report_study import BESIDE, MAIN, Arm, Table, arms_of

HEADINGS = ["expected", "arm", "beside", "better by", "so it is here"]


class Claim(NamedTuple):
    """An order of two arms, or of one and several others.

    study, family: where it is checked
    text:     who expects what
    better:   name of the arm that should be better, or no worse; * at its end is any ending
    worse:    names of the others
    margin:   by which it may be worse, in the figure's own units; None wants it better
    relative: whether the margin is a share of the other arm's figure
    halfway:  an arm: half of what it is better than the other by is a margin
    near:     whether it may be better by no more than the margin either
    least:    by which it should be better, where it should be so by much
    """

    study: str
    family: str
    text: str
    better: str
    worse: tuple[str, ...]
    margin: float | None = None
    relative: bool = False
    halfway: str = ""
    near: bool = False
    least: float = 0.0


LIKE = {"more-data": "families"}  # studies that claim what another does
WHOLE, SHALLOW = "end to end", "end to end, as deep as a block"
EVEN = "equal probability, [4, 4, 4]"
CLAIMS = (
    Claim("families", "vit", "within a point of end to end", "3 blocks", (WHOLE,), 0.01),
    Claim("families", "vit", "better than a block's depth alone", "3 blocks", (SHALLOW,)),
    Claim(
        "families", "vit", "better than with the paper's prior", "3 blocks",
        ("3 blocks, the paper's prior",),
    ),
    Claim("families", "dit", "within 5 % of end to end", "3 blocks", (WHOLE,), 0.05, True),
    Claim("families", "dit", "better than a block's depth alone", "3 blocks", (SHALLOW,)),
    Claim("families", "mdm", "within 2 % of end to end", "3 blocks", (WHOLE,), 0.02, True),
    Claim(
        "families", "ar", "at most half its distance to all layers behind a block's depth",
        "3 blocks, recommended", (SHALLOW,), 0.0, halfway=WHOLE,
    ),
    Claim(
        "families", "ar", "better than the paper's mode",
        "3 blocks, recommended", ("3 blocks, the paper's",),
    ),
    *(
        Claim(
            study, "huginn", "within 5 % of the recurrent network",
            name, ("recurrent",), 0.05, True,
        )
        for study in ("families", "huginn")
        for name in ("one pass, as many updates", "one pass, as much arithmetic")
    ),
    Claim(
        "blocks", "dit", "the paper: two blocks are best",
        "2 blocks", ("1 block", "3 blocks", "4 blocks", "6 blocks"),
    ),
    Claim(
        "partition", "dit", "the paper: equal probability is best",
        EVEN, ("log uniform, [4, 4, 4]", "linear, [4, 4, 4]"),
    ),
    Claim(
        "partition", "dit", "the paper: an even split is best", EVEN,
        tuple(f"equal probability, {split}" for split in ([3, 6, 3], [6, 4, 2], [2, 4, 6])),
    ),
    Claim(
        "partition", "ar", "equal information is best", "equal information",
        tuple(f"{name} of the paper's prior"
              for name in ("equal probability", "log uniform", "linear")),
    ),
    Claim(
        "overlap", "dit", "the paper: overlap is not worse than none",
        "overlap 0.05", ("overlap 0",), 0.0,
    ),
    Claim("weighting", "vit", "a cross-entropy needs no weight", "none", (
        "that of the process", "the same, of mean 1 in a block", "the published code's"), 0.0),
    Claim("weighting", "dit", "the weight of the process is best", "that of the process", (
        "none", "the same, of mean 1 in a block", "the published code's")),
    Claim("conditioning", "vit", "layers need the noise level", "with", ("without",)),
    Claim(
        "baselines", "vit", "the paper: Forward-Forward is 25 points behind or more",
        "diffusion blocks, ViT", ("forward-forward, ViT",), least=0.25,
    ),
    Claim(
        "baselines", "vit", "the paper: NoProp-DT is within a point", "diffusion blocks, CNN",
        ("noprop-dt, CNN",), 0.01, near=True,
    ),
    Claim(
        "baselines", "vit", "the paper: NoProp's continuous forms are behind",
        "diffusion blocks, CNN", ("noprop-ct, CNN", "noprop-fm, CNN"),
    ),
    Claim(
        "layer-sweep", "vit", "the conjecture: layers are best cut at the seams",
        "3 blocks, cut at the seams*", ("3 blocks, even",),
    ),
)  # fmt: skip


def verdicts(rows: Sequence[Row], claims: Sequence[Claim] = CLAIMS) -> Table:
    """Which claims hold among the rows of one table, each with its figures.

    A better figure is a difference of the means of more than the larger of the two standard
    deviations; one of less is within the spread, and one seed tells nothing. Of three seeds each,
    one pair of equal arms in five differs by more than that. What a family is compared by beside
    its main figure has a line of its own.

    Args:
        rows:    of one study, scale, family and data
        claims:  those of others are left out
    Returns:
        HEADINGS and a line for each pair of arms; nothing where there is none.
    """
    arms, family, study = arms_of(rows), rows[0]["family"], rows[0]["study"]
    main, best, _ = MAIN[family]
    lines = []
    for claim in claims:
        if (claim.study, claim.family) != (LIKE.get(study, study), family):
            continue
        for first in (arm for arm in arms if _is(arm, claim.better)):
            for other in (arm for arm in arms if any(_is(arm, name) for name in claim.worse)):
                whole = next((arm for arm in arms if arm.name == claim.halfway), None)
                if claim.halfway and whole is None:
                    continue
                for figure, where in {main: "", **BESIDE.get(family, {})}.items():
                    if first.has(figure) and other.has(figure):
                        said = _compared(first, other, whole, claim, figure, best)
                        lines.append([claim.text + where, first.name, other.name, *said])
    return [HEADINGS, *lines] if lines else []


def _is(arm: Arm, name: str) -> bool:
    return arm.name.startswith(name[:-1]) if name.endswith("*") else arm.name == name


def _compared(
    first: Arm, other: Arm, whole: Arm | None, claim: Claim, name: str, best: Callable
) -> tuple[str, str]:
    """By how much the first is better, and what follows."""
    sign = 1 if best is max else -1
    a, b = first.last(name), other.last(name)
    gain = sign * (statistics.fmean(a) - statistics.fmean(b))
    if best is max:
        by = f"{100 * gain:+.1f} points"
    else:
        beside = abs(statistics.fmean(b))
        share = f" ({100 * gain / beside:+.1f} %)" if beside else ""
        by = f"{gain:+.3g}{share}"
    if min(len(a), len(b)) < 2:
        return by, "one seed tells nothing"
    spread = max(statistics.stdev(a), statistics.stdev(b))
    if claim.margin is None:
        holds = gain > max(spread, claim.least)
    else:
        allowed = claim.margin * (abs(statistics.fmean(b)) if claim.relative else 1)
        if whole is not None:
            better = sign * (statistics.fmean(whole.last(name)) - statistics.fmean(b))
            allowed += max(better, 0) / 2
        holds = -allowed <= gain and not (claim.near and gain > allowed)
    return by, "yes" if holds else "within the spread" if abs(gain) <= spread else "**no**"
