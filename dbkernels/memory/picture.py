"""A picture of a predicted step: live bytes by category, op after op."""

from pathlib import Path

from dbkernels.memory.levels import Levels, levels
from dbkernels.memory.predict import Prediction

GiB = 2**30
SIZE = (9.0, 4.5)  # inches
PARTS = 900  # about as many as the picture has columns, so that a .svg stays small
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
    shown = levels(prediction, parts=PARTS)
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    lines = [[bytes_ / GiB for bytes_ in shown.by_category[name]] for name in COLOURS]
    labels = [name.replace("_", " ") for name in COLOURS]
    axes.stackplot(shown.starts, lines, labels=labels, colors=COLOURS.values(), lw=0)
    _mark_phases(axes, shown)
    _mark_peak(axes, shown, prediction)
    axes.set(title=title, xlabel="ops, in order", ylabel="GiB allocated")
    axes.set_xlim(0, shown.starts[-1])
    handles, names = axes.get_legend_handles_labels()
    # from top to bottom as in the stack
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def _mark_phases(axes, shown: Levels) -> None:
    end = shown.starts[-1] + 1
    ends = [start for _, start in shown.phases[1:]] + [end]
    for (phase, start), until in zip(shown.phases, ends, strict=True):
        # what is so narrow has no room for its name
        if until - start > 0.04 * end:
            axes.axvline(start, color="black", lw=0.6, alpha=0.4)
            axes.text(start, 1.0, f" {phase}", va="top", transform=axes.get_xaxis_transform())


def _mark_peak(axes, shown: Levels, prediction: Prediction) -> None:
    peak, totals = prediction.peak_allocated_bytes / GiB, shown.totals
    part = max(range(len(totals)), key=totals.__getitem__)
    place = shown.starts[part]
    axes.set_ylim(0, 1.22 * peak)
    text = f"{peak:.2f} GiB\n{prediction.at}"
    # inside the axes also where the peak is at one end
    side = ("left", "center", "right")[3 * part // len(totals)]
    axes.annotate(text, (place, peak), (0, 6), textcoords="offset points", ha=side, fontsize=8)
    axes.plot(place, peak, "v", color="black", markersize=4)
