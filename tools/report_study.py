"""Tables and pictures of studies: arms over their seeds, and what the paper has beside it."""

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from palette import PALETTE
from report_names import FAMILIES, number_text
from report_rows import Row

from dbkernels.memory.units import in_words

if TYPE_CHECKING:  # a table is shown without matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Table = list[list[str]]
MISSING = "–"
Figures = list[float]


class Shown(NamedTuple):
    """A column: its heading, the figure of a row, how a number is written, and which is best."""

    title: str
    name: str
    text: Callable[[float], str]
    best: Callable | None = None  # of the last number of each arm
    last: bool = False  # whether the last number is shown alone
    spread: bool = True  # whether the standard deviation is shown
    over: Callable[[Figures], float] = statistics.fmean  # of the seeds


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _loss(loss: float) -> str:
    return f"{loss:.4f}"


def _bits(bits: float) -> str:
    return f"{bits:.3f}"


SHOWN = (
    Shown("accuracy after each step, %", "accuracy", _percent, max),
    Shown("from a start of noise, %", "accuracy_of_a_start", _percent),
    Shown("starts differ by, points", "accuracy_between_starts", _percent),
    Shown("mean of the starts, %", "accuracy_of_starts", _percent, last=True),
    Shown("cross-entropy", "cross_entropy", number_text, last=True),
    Shown("calibration error, %", "calibration_error", _percent, last=True),
    Shown("Fréchet distance", "frechet", number_text, min),
    Shown("precision, %", "precision", _percent, max),
    Shown("recall, %", "recall", _percent, max),
    Shown("recognised as asked, %", "recognised", _percent, max),
    Shown("Fréchet distance, close levels", "frechet_close", number_text, min),
    Shown("recognised, close levels, %", "recognised_close", _percent, max),
    Shown("bits", "bits", _bits, min),
    Shown("down to the least level", "bits_down_to_least", _bits),
    Shown("at the most noise", "bits_at_most_noise", _bits),
    Shown("bits of each block", "bits_of_blocks", _bits),
    Shown("loss of each block", "loss_of_blocks", number_text, spread=False),
    Shown("at the most noise, loss", "loss_at_most_noise", number_text),
    Shown("loss over all noise", "mean_loss", _loss),
    Shown("predicted", "predicted_loss", _loss, spread=False),
    Shown("passes of an image", "forwards", number_text, spread=False),
    Shown("peak of a step", "peak_bytes", in_words, min, spread=False),
    # others kept the machine busy, so the least of the seeds is nearest
    Shown("a step of every block, ms", "sweep_ms", number_text, min, spread=False, over=min),
)
MAIN = {  # of each family: the figure that its arms are compared by, and which is better
    "vit": ("accuracy", max, "accuracy after the last step, %"),
    "dit": ("frechet", min, "Fréchet distance"),
    "mdm": ("bits", min, "bits per character"),
    "ar": ("bits", min, "bits per character"),
    "huginn": ("bits", min, "bits per character"),
}
BESIDE = {"dit": {"frechet_close": ", on close levels"}}  # what they are compared by too


class Arm(NamedTuple):
    """The rows of an arm, one of each seed."""

    name: str
    rows: list[Row]

    def has(self, name: str) -> bool:
        return all(name in row for row in self.rows)

    def of(self, name: str) -> list[Figures]:
        """A figure of every seed, as a list: of steps or blocks, or of one number."""
        found = [row[name] for row in self.rows]
        lists = [value if isinstance(value, list) else [value] for value in found]
        if len({len(each) for each in lists}) > 1:
            raise ValueError(f"{name} of {self.name} must have as many numbers for each seed")
        return lists

    def last(self, name: str) -> Figures:
        """The last number of each seed's."""
        return [values[-1] for values in self.of(name)]


def arms_of(rows: Sequence[Row]) -> list[Arm]:
    """The arms of one table, in the order of their first rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return [Arm(*each) for each in found.items()]


def study_table(rows: Sequence[Row]) -> Table:
    """A line for each arm: means over seeds, ± their standard deviation.

    Args:
        rows:  of one study, scale, family and data
    Returns:
        the headings, then the lines; the best of each figure is bold.
    """
    arms = arms_of(rows)
    shown = [each for each in SHOWN if any(arm.has(each.name) for arm in arms)]
    lines = [["trained", "layers", "updates", "seeds", *(each.title for each in shown)]]
    best = {
        each.name: each.best(_mean(arm, each) for arm in arms if arm.has(each.name))
        for each in shown
        if each.best and len(arms) > 1
    }
    for arm in arms:
        row = arm.rows[0]
        layers = "+".join(map(str, row["layers"]))
        line = [arm.name, layers, f"{row['updates']:,}", str(len(arm.rows))]
        for each in shown:
            if not arm.has(each.name):
                line.append(MISSING)
                continue
            places = [_over(place, each) for place in _places(arm, each.name)]
            # steps that all answer alike, as those of a network without blocks, are one
            alike = each.last or len(set(places)) == 1
            text = places[-1] if alike else ", ".join(places)
            is_best = each.name in best and _mean(arm, each) == best[each.name]
            line.append(f"**{text}**" if is_best else text)
        lines.append(line)
    return lines


def _places(arm: Arm, name: str) -> list[Figures]:
    return [list(place) for place in zip(*arm.of(name), strict=True)]


def _mean(arm: Arm, shown: Shown) -> float:
    return shown.over(arm.last(shown.name))


def _over(values: Figures, shown: Shown) -> str:
    mean = shown.text(shown.over(values))
    told = shown.spread and len(values) > 1
    return f"{mean} ± {shown.text(statistics.stdev(values))}" if told else mean


def study_picture(tables: Sequence[Sequence[Row]]) -> "Figure":
    """A panel for each table of a study: the main figure of each arm, a dot for each seed.

    What a family is compared by beside it has a panel of its own.
    """
    from matplotlib.figure import Figure

    shown = []
    for rows in tables:
        arms, (main, _, _) = arms_of(rows), MAIN[rows[0]["family"]]
        for name, where in {main: "", **BESIDE.get(rows[0]["family"], {})}.items():
            if some := [arm for arm in arms if arm.has(name)]:
                shown.append((some, name, where))
    heights = [len(arms) for arms, _, _ in shown]
    figure = Figure((8.5, 0.7 * len(shown) + 0.27 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights).flatten()
    for axes, each in zip(panels, shown, strict=True):
        _panel(axes, *each)
    return figure


def _panel(axes: "Axes", arms: Sequence[Arm], name: str, where: str) -> None:
    row = arms[0].rows[0]
    _, best, label = MAIN[row["family"]]
    times = 100 if best is max else 1  # shares are in percent
    means = [times * statistics.fmean(arm.last(name)) for arm in arms]
    for place, (arm, mean) in enumerate(zip(arms, means, strict=True)):
        values = [times * value for value in arm.last(name)]
        colour = PALETTE[5] if mean == best(means) else PALETTE[1]
        axes.plot(values, [place] * len(values), "o", ms=4, alpha=0.6, color=colour)
        axes.plot([mean], [place], "|", ms=14, mew=2, color=colour)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_title(f"{FAMILIES[row['family']]}, {row['data']}{where}")
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.25)
