"""What blocks cost a model of text in arithmetic, and save in activations, counted."""

from dataclasses import replace

import benchmark_rows as made
import pytest

from dbkernels.models import ar, mdm


@pytest.fixture(scope="module")
def rows_of(bench):
    """The rows of `benchmarks/cost.py` by its options, of models of 4 layers."""

    def run(**options):
        chosen = bench("cost").Options(**options)
        rows = [r for table in chosen.tables(bench("program").Known(None, None)) for r in table]
        assert [row | key for row, key in zip(rows, chosen.wanted(), strict=True)] == rows
        return rows

    with pytest.MonkeyPatch.context() as patch:
        sizes = {"depth": 4, "dim": 64, "mlp_hidden": 176, "cond_dim": 8}
        for presets in (mdm.PRESETS, ar.PRESETS):
            patch.setitem(presets, "tiny", replace(presets["small"], **sizes))
        patch.setitem(ar.PRESETS, "posterior", ar.PRESETS["tiny"])
        patch.setitem(ar.PRESETS, "tiny", replace(ar.PRESETS["tiny"], read_out="paper"))
        yield run


def test_masked_blocks_compute_no_layer_twice_and_keep_their_share(rows_of):
    whole, four = rows_of(family="mdm", preset="tiny", words=(300,), num_blocks=(1, 4))
    assert (whole["method"], four["method"]) == ("end_to_end", "block_fused")
    assert four["layers_flops"] == pytest.approx(whole["layers_flops"], rel=0.01)
    # forward and two products of the backward, of each token that a block may mask
    assert whole["head_flops"] == 6 * 300 * 64
    # all levels are masked at most once by each block
    assert 1.9 * whole["head_flops"] < four["head_flops"] < 4 * whole["head_flops"]
    for row in (whole, four):
        assert row["sweep_flops"] == row["layers_flops"] + row["head_flops"]
    assert 0.2 < four["kept_units"] / whole["kept_units"] < 0.4


S, D, HIDDEN = 64, 64, 176
# of a token in forward and backward: a layer's matmuls, its attention, and its keys and values
LAYER, ATTENTION = 6 * (4 * D**2 + 3 * D * HIDDEN), 3.5 * 4 * S * D
KEYS = 12 * D**2


def test_blocks_of_a_language_model_read_each_token_twice(rows_of):
    # of two layers two are noisy, one is clean, and of the other clean one keys and values are
    ordinary, half, guessing, through = rows_of(family="ar", preset="tiny", num_blocks=(2,))
    assert ordinary["method"] == "end_to_end"
    expected = {4: ordinary, 2 * 3: half, 2 * 4: guessing, 2 * 4 + 2 / 3: through}
    for layers, row in expected.items():
        matmuls = layers * LAYER + (2 * KEYS if row is half else 0)
        attended = layers + (2 / 3.5 - 2 / 3 if row is through else 0)
        assert row["layers_flops"] == pytest.approx(matmuls + attended * ATTENTION, rel=0.02)
    heads = [row["head_flops"] / (6 * 27 * D) for row in (ordinary, half, guessing, through)]
    assert heads == [1, 2, 4, 4]
    # rows that hold z are twice as wide, and those of an ordinary network hold none
    rows = rows_of(family="ar", preset="posterior", num_blocks=(2,))
    assert [row["head_flops"] / (6 * 27 * D) for row in rows] == [1, 4, 8, 8]
    # 11 numbers for the four of the hidden layer, which has 5.5 here; and x, keys and values
    unit = 11 - 4 + 2 * HIDDEN / D
    kept = half["kept_units"] - (ordinary["kept_units"] - 4 * unit)
    assert kept == pytest.approx(3 * unit + 3, rel=0.05)


def test_a_report_has_a_table_for_each_vocabulary(rows_of, bench, tmp_path):
    rows = rows_of(family="mdm", preset="tiny", words=(300, 20), num_blocks=(4, 1))
    show = bench("show")
    found = show.tables(show.read([made.write(tmp_path / "rows.jsonl", rows)]), "cost")
    assert [[row["words"] for row in table] for table in found] == [[300, 300], [20, 20]]
    heading, first, second = show.table_of(found[0])
    assert (first[0], second[0]) == ("4 blocks", "end to end")
    assert heading[-1] == "of end to end" and second[-1] == "1.00"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "vit"}, "family must be of mdm, ar.*, got vit"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"num_blocks": (99,)}, "num_blocks must be between 1 and the 6 layers, got 99"),
    ],
)
def test_rejects(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench("cost").Options(**options)
