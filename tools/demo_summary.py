"""The summary table of the demo's report: every run against the one trained end to end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from demo_drawing import bytes_text, finite

MISSING = '<span class="missing">not measured</span>'


@dataclass(frozen=True)
class Metric:
    """One row: how to read it from a run and its baseline, how to write it, which way is better."""

    title: str
    value: Callable[[dict, dict], float | None]
    text: Callable[[float], str]
    better: Literal["higher", "lower"] | None = "lower"


def _of(key: str) -> Callable[[dict, dict], float | None]:
    return lambda run, _: finite(run.get(key))


def _final_accuracy(run: dict, _: dict) -> float | None:
    return finite((run.get("accuracy") or [None])[-1])


def _saved_ratio(run: dict, baseline: dict) -> float | None:
    saved, whole = finite(run.get("saved_bytes")), finite(baseline.get("saved_bytes"))
    return saved / whole if saved is not None and whole else None


def percent_text(value: float) -> str:
    """Write a share as a percentage.

    Args:
        value:  0 to 1
    Returns:
        such as "96.1 %".
    """
    return f"{100 * value:.1f} %"


def seconds_text(value: float) -> str:
    """Write a duration in the unit that reads best.

    Args:
        value:  seconds
    Returns:
        such as "7 min 11 s", "1.25 s" or "31.2 ms".
    """
    if round(value) >= 60:
        return f"{round(value) // 60} min {round(value) % 60} s"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


QUALITY = {
    "classification": Metric(
        "Accuracy after the last step", _final_accuracy, percent_text, "higher"
    ),
    "generation": Metric("Fréchet distance", _of("frechet"), "{:.3g}".format),
}
COSTS = (
    Metric("Peak memory of a step", _of("peak_bytes"), bytes_text),
    Metric("Saved activations", _of("saved_bytes"), bytes_text),
    Metric("Saved activations, ratio to end to end", _saved_ratio, "{:.2f}×".format),
    Metric("Time per step", _of("seconds_per_step"), seconds_text),
    Metric("Time per sweep", _of("seconds_per_sweep"), seconds_text),
    Metric("Updates per layer", _of("updates_per_layer"), "{:,.0f}".format, None),
)


def summary_table(task: str, runs: Sequence[dict]) -> str:
    """Lay out every run of a task, a column each, and mark what is better or worse.

    Args:
        task:   "classification" or "generation"
        runs:   the first one of a single block is what the others are compared with
    Returns:
        a table element, or "not measured" without a run.
    """
    if not runs:
        return MISSING
    baseline = next((run for run in runs if run["num_blocks"] == 1), {})
    names = "".join(f'<th scope="col">{escape(run["name"])}</th>' for run in runs)
    rows = "\n".join(
        f'<tr><th scope="row">{metric.title}</th>'
        + "".join(f"<td>{_cell(metric, run, baseline)}</td>" for run in runs)
        + "</tr>"
        for metric in (QUALITY[task], *COSTS)
    )
    return f"<table><thead><tr><td></td>{names}</tr></thead>\n<tbody>{rows}</tbody></table>"


def _cell(metric: Metric, run: dict, baseline: dict) -> str:
    value, reference = metric.value(run, baseline), metric.value(baseline, baseline)
    if value is None:
        return MISSING
    text = metric.text(value)
    if metric.better is None or reference is None or run is baseline:
        return text
    if text == metric.text(reference):
        # a difference too small to be written is too small to be called one
        verdict = "same"
    else:
        verdict = "better" if (value > reference) == (metric.better == "higher") else "worse"
    sign = {"better": "✓ ", "worse": "✗ ", "same": ""}[verdict]
    return f'{text}<span class="{verdict}">{sign}{verdict}</span>'
