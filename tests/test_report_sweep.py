"""The picture of sweeps over layers: means, bands, and where blocks begin."""

import numpy as np
import pytest
from checkout_tools import tool


def made_sweep(r, block=(0, 0, 0, 1, 1), **changes):
    """Of four layers, whose stream before them has no distances."""
    sweep = {
        "layers": [0, 1, 2, 3, 4],
        "block": list(block),
        "r": [0.0, *r],
        "null_low": [0.0, -0.3, -0.3, -0.3, -0.3],
        "null_median": [0.0] * 5,
        "null_high": [0.0, 0.3, 0.3, 0.3, 0.5],
        "p": [1.0, 0.1, 0.1, 0.1, 0.1],
    }
    return sweep | changes


def made_rows():
    rows = []
    for seed, shift in enumerate((0.0, 0.2)):
        r = np.array([0.1, 0.2, 0.5, 0.7]) + shift
        modes = {"trajectory": made_sweep(r), "within": made_sweep(r - 0.1)}
        rows.append({"arm": "3 blocks", "seed": seed, "sweeps": modes})
    whole = {"trajectory": made_sweep([0.3, 0.4, 0.5, 0.6], block=(0,) * 5)}
    return [*rows, {"arm": "end to end", "seed": 0, "sweeps": whole}]


@pytest.fixture
def section():
    return tool("report_sweep").sweep_section


def panels_of(section, rows):
    return section(rows).picture.axes


def curves(axes):
    """Lines with a mark at each layer: of each block and mode."""
    return [line for line in axes.lines if line.get_marker() == "."]


def test_each_arm_has_a_panel_with_both_modes_in_each_block(section):
    blockwise, whole = panels_of(section, made_rows())
    assert [axes.get_title() for axes in (blockwise, whole)] == ["3 blocks", "end to end"]
    found = [line.get_xdata().tolist() for line in curves(blockwise)]
    assert found == [[0, 1, 2], [3, 4]] * 2
    styles = [(line.get_color(), line.get_linestyle()) for line in curves(blockwise)]
    assert styles[0] == styles[1] != styles[2] == styles[3]
    [line] = curves(whole)
    assert line.get_xdata().tolist() == [0, 1, 2, 3, 4]


def test_a_line_is_the_mean_of_the_seeds_and_a_band_their_range(section):
    blockwise, _ = panels_of(section, made_rows())
    first, second, within, _ = (line.get_ydata() for line in curves(blockwise))
    assert first == pytest.approx([np.nan, 0.2, 0.3], nan_ok=True)
    assert second == pytest.approx([0.6, 0.8])
    assert within == pytest.approx([np.nan, 0.1, 0.2], nan_ok=True)
    null, _, band, *_ = (each.get_paths()[0].vertices[:, 1] for each in blockwise.collections)
    assert (band.min(), band.max()) == pytest.approx((0.5, 0.9))
    assert (null.min(), null.max()) == pytest.approx((-0.3, 0.5))


def test_blocks_are_parted_by_lines_across(section):
    blockwise, whole = panels_of(section, made_rows())
    dotted = [line for line in blockwise.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [2.5]
    assert not [line for line in whole.lines if line.get_linestyle() == ":"]


def test_ticks_are_the_layers_as_they_run(section):
    sweeps = {"within": made_sweep([0.1] * 4, layers=[0, 3, 4, 1, 2])}
    [axes] = panels_of(section, [{"arm": "deepest", "seed": 0, "sweeps": sweeps}])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "3", "4", "1", "2"]


def test_arms_have_panels_on_one_scale_three_in_a_line_and_one_legend(section):
    rows = [*made_rows(), *({**made_rows()[2], "arm": name} for name in ("seams", "others"))]
    found = section(rows)
    first, *_, fourth, fifth, sixth = found.picture.axes
    assert fourth.get_ylim() == first.get_ylim() and fourth.get_ylim()[1] == 1
    assert fourth.axison and not fifth.axison and not sixth.axison
    [legend] = found.picture.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "classes change places", "answer of the last step", "answer of the block's own step"
    ]  # fmt: skip
    assert "Each panel has 1 or 2 seeds." in found.text
    assert "Each panel has 1 seed." in section(rows[2:]).text


def changed(row, **changes):
    sweeps = {mode: each | changes for mode, each in row["sweeps"].items()}
    return {**row, "sweeps": sweeps}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: None, "rows of sweeps must be at least one, got none"),
        (lambda row: [{**row, "sweeps": {}}], "of 3 blocks must be of trajectory, within, got no"),
        (lambda row: [{**row, "sweeps": {"both": made_sweep([0] * 4)}}], "within, got both"),
        (lambda row: [row, changed(row, block=[0] * 5)], "3 blocks must have the same modes"),
        (lambda row: [row, changed(row, layers=[0, 2, 1, 3, 4])], "the same modes, layers"),
        (
            lambda row: [row, {**row, "sweeps": {"within": row["sweeps"]["within"]}}],
            "the same modes, layers",
        ),
    ],
)
def test_rejects(change, message, section):
    with pytest.raises(ValueError, match=message):
        section(change(made_rows()[0]) or [])
