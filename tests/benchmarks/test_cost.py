"""What blocks cost a model of text in arithmetic, and save in activations, counted."""

from dataclasses import replace

import benchmark_rows as made
import pytest

from dbkernels.models import mdm


@pytest.fixture(scope="module")
def rows_of(bench):
    """The rows of `benchmarks/cost.py` by its options, of models of 4 layers."""

    def run(**options):
        chosen = bench("cost").Options(**options)
        rows = [r for table in chosen.tables(bench("program").Known(None, None)) for r in table]
        assert [row | key for row, key in zip(rows, chosen.wanted(), strict=True)] == rows
        return rows

    with pytest.MonkeyPatch.context() as patch:
        small = replace(mdm.PRESETS["small"], depth=4, dim=64, mlp_hidden=176)
        patch.setitem(mdm.PRESETS, "tiny", small)
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
