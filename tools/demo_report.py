"""One self-contained HTML page from the demo's results: no network, no script, no other file."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from demo_drawing import SIGMA_HIGH, block_colour, finite
from demo_figures import (
    accuracy_figure,
    bars_figure,
    bytes_figure,
    digits_png,
    loss_figure,
    loss_rows,
    partition_figure,
    serving_block,
)
from demo_prose import INTRODUCTION, SECTIONS
from demo_summary import MISSING, percent_text, seconds_text, summary_table
from page import document, write_whole

TASKS = ("classification", "generation")
REQUIRED = ("device", "torch", "commit", "command", *TASKS)
REQUIRED_OF_RUN = ("name", "num_blocks", "blocks", "prior")
REQUIRED_OF_BLOCK = ("index", "layers", "low", "high", "trained_low", "trained_high")
COLUMNS = 10  # images in a row where nothing else says how many


def write_report(results: dict, path: Path) -> None:
    """Write the page; the file appears whole or not at all.

    Args:
        results:  what the demo measured; a number that is missing or NaN shows as "not measured"
        path:     of the HTML file; its folder is made, an older file is replaced
    Raises:
        ValueError: the results, a run or a block lacks a key that the page cannot do without.
    """
    _check(results)
    write_whole(path, _page(results))


def _check(results: dict) -> None:
    _require(results, REQUIRED, "results")
    for task in TASKS:
        names = [run.get("name") for run in results[task]]
        if len(set(names)) < len(names):
            raise ValueError(f"runs of {task} must have different names, got {names}")
        for run in results[task]:
            _require(run, REQUIRED_OF_RUN, f"each run of {task}")
            if not run["blocks"]:
                raise ValueError(f"run {run['name']!r} of {task} must have a block, got none")
            for block in run["blocks"]:
                _require(block, REQUIRED_OF_BLOCK, f"each block of {run['name']!r}")


def _require(record: dict, keys: Sequence[str], name: str) -> None:
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"{name} must have {', '.join(missing)}, got only {', '.join(record)}")


def _page(results: dict) -> str:
    sections = (_summary, _losses, _accuracy, _cross_entropy, _noise, _memory, _digits)
    return document(
        "Block by block or end to end",
        ["demo_report.css"],
        header=f"<h1>Training a network block by block, against end to end</h1>\n"
        f"<p>{INTRODUCTION}</p>\n{_key(results)}",
        main="\n".join(section(results) for section in sections),
        footer=f'<p class="measured">{_provenance(results)}</p>',
    )


def _provenance(results: dict) -> str:
    seconds = finite(results.get("seconds"))
    took = "time " + MISSING if seconds is None else seconds_text(seconds)
    return (
        f"Everything on this page: <code>{_text(results, 'command')}</code> on "
        f"{_text(results, 'device')}, torch {_text(results, 'torch')}, "
        f"commit {_text(results, 'commit')}; {took} in all."
    )


def _text(results: dict, key: str) -> str:
    return escape(str(results[key]))


def _key(results: dict) -> str:
    """Say which colour is which block, once for the whole page."""
    colours = {}
    for _, run in _runs(results):
        for block in run["blocks"]:
            name = "end to end" if run["num_blocks"] == 1 else f"block {block['index']}"
            colours[name] = block_colour(run, block["index"])
    items = "".join(
        f'<li><span style="background: {"currentColor" if name == "end to end" else colour}">'
        f"</span>{name}</li>"
        for name, colour in colours.items()
    )
    return f'<ul class="key">{items}</ul>'


def _runs(results: dict) -> Iterator[tuple[str, dict]]:
    return ((task, run) for task in TASKS for run in results[task])


def _section(name: str, cells: Sequence[str], results: dict) -> str:
    prose = SECTIONS[name]
    where = f"{_text(results, 'device')}; <code>{_text(results, 'command')}</code>"
    return f"""<section id="{name}">
<h2>{prose.title}</h2>
<p>{prose.see}</p>
<div class="columns">
{"".join(cells) or f"<p>{MISSING}</p>"}
</div>
<p class="measured"><b>How it was measured:</b> {prose.how} {where}.</p>
</section>"""


def _cell(title: str, content: str | None) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{content or MISSING}</figure>\n"


def _summary(results: dict) -> str:
    cells = [_cell(task.capitalize(), summary_table(task, results[task])) for task in TASKS]
    return _section("summary", cells, results)


def _losses(results: dict) -> str:
    cells = []
    for task in TASKS:
        values = [loss for run in results[task] for loss in loss_rows(run)[:, 2]]
        limits = (min(values, default=0), max(values, default=0))
        for run in results[task]:
            title = f"{task.capitalize()}, {run['name']}"
            cells.append(_cell(title, loss_figure(run, limits, f"Training loss: {title}")))
    return _section("loss", cells, results)


def _accuracy(results: dict) -> str:
    runs = results["classification"]
    figure = accuracy_figure(runs, "Accuracy after each Euler step")
    cells = [_cell("Classification", figure), _cell("In numbers", _accuracy_table(runs))]
    return _section("accuracy", cells, results)


def _accuracies(run: dict) -> list[str]:
    values = [finite(value) for value in run.get("accuracy") or ()]
    return [MISSING if value is None else percent_text(value) for value in values]


def _accuracy_table(runs: Sequence[dict]) -> str | None:
    steps = max((len(_accuracies(run)) for run in runs), default=0)
    if not steps:
        return None
    names = "".join(f'<th scope="col">{escape(run["name"])}</th>' for run in runs)
    rows = ""
    for step in range(steps):
        cells = "".join(f"<td>{_accuracy_cell(run, step)}</td>" for run in runs)
        rows += f'<tr><th scope="row">step {step + 1}</th>{cells}</tr>\n'
    return f"<table><thead><tr><td></td>{names}</tr></thead><tbody>{rows}</tbody></table>"


def _accuracy_cell(run: dict, step: int) -> str:
    accuracies, levels = _accuracies(run), run.get("levels") or ()
    text = accuracies[step] if step < len(accuracies) else MISSING
    level = finite(levels[step]) if step < len(levels) else None
    return text if level is None else f'{text}<span class="same">at sigma {level:.3g}</span>'


def _cross_entropy(results: dict) -> str:
    top, by_block = [], []
    for run in results["classification"]:
        colour = block_colour(run, serving_block(run, SIGMA_HIGH))
        top.append((run["name"], finite(run.get("ce_at_sigma_max")), colour))
        values = run.get("ce_by_block") or ()
        for index, value in enumerate(values):
            name = run["name"] if len(values) == 1 else f"{run['name']}, block {index}"
            by_block.append((name, finite(value), block_colour(run, index)))
    title = "cross-entropy, nats"
    cells = [
        _cell("At sigma_max", bars_figure(top, title, "Cross-entropy at sigma_max")),
        _cell("By block", bars_figure(by_block, title, "Cross-entropy by block")),
    ]
    return _section("cross-entropy", cells, results)


def _noise(results: dict) -> str:
    titles: dict[str, list[str]] = {}
    runs = {}
    for task, run in _runs(results):
        runs.setdefault(repr(run["blocks"]), run)
        titles.setdefault(repr(run["blocks"]), []).append(f"{task.capitalize()}, {run['name']}")
    cells = [
        _cell(" · ".join(names), partition_figure(runs[key], f"Noise of {names[0]}"))
        for key, names in titles.items()
    ]
    return _section("noise", cells, results)


def _memory(results: dict) -> str:
    cells = [
        _cell(task.capitalize(), bytes_figure(results[task], f"Bytes by category: {task}"))
        for task in TASKS
    ]
    return _section("memory", cells, results)


def _digits(results: dict) -> str:
    grids = {run["name"]: _rows_by_class(run) for run in results["generation"]}
    widths = [len(images) for rows in grids.values() for _, images in rows]
    real = _chunks(results.get("real_images") or [], max(widths, default=COLUMNS))
    cells = [_cell("Real digits", _grid(real, "Real digits"))]
    for name, rows in grids.items():
        cells.append(_cell(f"Generated, {name}", _grid(rows, f"Digits generated, {name}")))
    return _section("digits", cells, results)


def _chunks(images: list, columns: int) -> list[tuple[str, list]]:
    return [("", images[i : i + columns]) for i in range(0, len(images), columns)]


def _rows_by_class(run: dict) -> list[tuple[str, list]]:
    """Group a run's images by the class they were asked for, or in tens without one."""
    images, labels = run.get("images") or [], run.get("image_labels") or []
    if len(images) != len(labels):
        return _chunks(images, COLUMNS)
    pairs = sorted(zip(labels, images, strict=True), key=lambda pair: pair[0])
    groups = groupby(pairs, key=lambda pair: pair[0])
    return [(str(label), [image for _, image in group]) for label, group in groups]


def _grid(rows: Sequence[tuple[str, list]], alt: str) -> str | None:
    if not rows:
        return None
    names = "".join(f"<span>{escape(label)}</span>" for label, _ in rows if label)
    labels = f'<div aria-hidden="true">{names}</div>' if names else ""
    image = digits_png([images for _, images in rows])
    return f'<div class="digits">{labels}<img src="{image}" alt="{escape(alt)}"></div>'
