"""A picture of a predicted step: live bytes by category, op after op."""

from itertools import groupby
from pathlib import Path

from dbkernels.memory.predict import Prediction
from dbkernels.memory.trace import CATEGORIES, START

GiB = 2**30
SIZE = (9.0, 4.5)  # inches
# Okabe and Ito's palette, which most eyes tell apart, and greys for what is always there
COLOURS = {
    "parameters": "#999999",
    "optimizer": "#BBBBBB",
    "inputs": "#F0E442",
    "saved_activations": "#D55E00",
    "gradients": "#CC79A7",
    "temporaries": "#56B4E9",
    "workspaces": "#000000",
}


def draw(path: Path, prediction: Prediction, *, title: str = "") -> None:
    """Draw a predicted step into a file.

    Args:
        path:        its ending names the format: .png, .svg, .pdf
        prediction:  what to draw
        title:       above the picture
    Raises:
        ValueError: matplotlib is not installed, or does not know the format.
    """
    try:
        # not needed by anything else of the package
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "matplotlib must be installed for a picture (pip install dbkernels[demo]), "
            "got an environment without it"
        ) from None
    levels, phases = _levels(prediction)
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    lines = [[bytes_ / GiB for bytes_ in levels[name]] for name in COLOURS]
    labels = [name.replace("_", " ") for name in COLOURS]
    axes.stackplot(range(len(lines[0])), lines, labels=labels, colors=COLOURS.values(), lw=0)
    _mark_phases(axes, phases)
    _mark_peak(axes, prediction, [sum(column) for column in zip(*lines, strict=True)])
    axes.set(title=title, xlabel="ops, in order", ylabel="GiB allocated")
    axes.set_xlim(0, len(lines[0]) - 1)
    handles, names = axes.get_legend_handles_labels()
    # from top to bottom as in the stack
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def _levels(prediction: Prediction) -> tuple[dict[str, list[int]], list[str]]:
    """Bytes of each category at the highest moment of each op, and each op's phase."""
    trace = prediction.blocks
    columns, phases = [], []
    for op, moments in groupby(trace.moments(), key=lambda moment: moment.op):
        columns.append(max(moments, key=lambda moment: moment.total_bytes).by_category)
        phases.append("" if op == START else trace.name(op).partition(":")[0])
    last = max((i for i, phase in enumerate(phases) if phase == "backward"), default=len(phases))
    # what follows is the norm of the gradients, and the optimizer
    phases[last + 1 :] = ["update"] * len(phases[last + 1 :])
    return dict(zip(CATEGORIES, zip(*columns, strict=True), strict=True)), phases


def _mark_phases(axes, phases: list[str]) -> None:
    start = 0
    for phase, ops in groupby(phases):
        count = len(list(ops))
        # what is so narrow has no room for its name
        if phase and count > 0.04 * len(phases):
            axes.axvline(start, color="black", lw=0.6, alpha=0.4)
            axes.text(start, 1.0, f" {phase}", va="top", transform=axes.get_xaxis_transform())
        start += count


def _mark_peak(axes, prediction: Prediction, totals: list[float]) -> None:
    peak = prediction.peak_allocated_bytes / GiB
    place = max(range(len(totals)), key=totals.__getitem__)
    axes.set_ylim(0, 1.22 * peak)
    text = f"{peak:.2f} GiB\n{prediction.at}"
    # inside the axes also where the peak is at one end
    side = ("left", "center", "right")[3 * place // len(totals)]
    axes.annotate(text, (place, peak), (0, 6), textcoords="offset points", ha=side, fontsize=8)
    axes.plot(place, peak, "v", color="black", markersize=4)
