import io

from rich.console import Console

from dbkernels.cli.profile_tables import (
    FEW,
    OP,
    SHORT,
    measured_table,
    not_measured,
    predicted_tables,
)
from dbkernels.memory.trace import CATEGORIES

GiB = 2**30


def row(method="block_fused", num_blocks=2, recompute="none", offload="none", size=GiB, **more):
    return {
        "family": "dit",
        "preset": "XL/2",
        "batch": 128,
        "autocast": True,
        "optimizer_in_backward": False,
        "target": "h100",
        "method": method,
        "num_blocks": num_blocks,
        "recompute": recompute,
        "offload": offload,
        "peak_allocated_bytes": size,
        "peak_reserved_bytes": 2 * size,
        "by_category": dict.fromkeys(CATEGORIES, size // 8),
        "at": "backward: aten::mm",
        "flops": 12.34e12,
        **more,
    }


def printed(tables):
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    return lines


def line_of(lines, start):
    return next(line for line in lines if line.strip().startswith(start))


def cells(line):
    return [cell.strip() for cell in line.split("│")]


def test_a_title_says_that_the_optimizer_is_in_the_backward():
    for told in (False, True):
        lines = printed(predicted_tables([row(optimizer_in_backward=told)]))
        assert any("optimizer in backward" in line for line in lines) == told


def test_each_number_of_blocks_has_a_column():
    rows = [row(num_blocks=count, size=count * GiB) for count in (1, 2, 3, 4, 6)]
    lines = printed(predicted_tables(rows))
    assert "dit XL/2, batch 128, bfloat16 compute" in lines[0]
    assert cells(line_of(lines, "fused none")) == ["fused none", "none"] + [
        f"{count}.00" for count in (1, 2, 3, 4, 6)
    ]


def test_what_has_no_such_number_of_blocks_is_left_empty():
    rows = [row("end_to_end", 1, None, size=50 * GiB), row(), row(offload="cpu", size=GiB // 2)]
    lines = printed(predicted_tables(rows))
    assert cells(line_of(lines, "end to end")) == ["end to end", "", "50.0", ""]
    fused = [cells(line) for line in lines if line.strip().startswith("fused none")]
    assert fused[:2] == [["fused none", "none", "", "1.00"], ["fused none", "cpu", "", "0.50"]]


def test_reserved_bytes_and_operations_follow():
    lines = printed(predicted_tables([row()]))
    fused = [cells(line)[-1] for line in lines if line.strip().startswith("fused none")]
    assert fused[:3] == ["1.00", "2.00", "12340"]


def test_small_models_are_told_in_mebibytes():
    lines = printed(predicted_tables([row(size=3 * 2**20)]))
    assert "MiB" in lines[1] and cells(line_of(lines, "fused none"))[-1] == "3.00"


def test_few_rows_are_shown_by_category_and_many_are_not():
    lines = printed(predicted_tables([row(at="backward: aten::" + "x" * 70)]))
    index, line = next((i, line) for i, line in enumerate(lines) if "fused none, 2" in line)
    assert cells(line)[1:] == ["0.12"] * len(CATEGORIES)
    assert [cells(below)[0] for below in lines[index + 1 :][:2]] == ["backward:", "x" * OP]
    assert set(SHORT) == set(CATEGORIES)
    many = [row(num_blocks=count) for count in range(1, FEW + 2)]
    assert len(list(predicted_tables(many))) == len(list(predicted_tables([row()]))) - 1


def test_a_peak_at_the_start_has_no_op():
    assert "  start" in str(printed(predicted_tables([row(at="start")])))


def test_predicted_stands_beside_measured():
    taken = {
        "measured_allocated_bytes": 2 * GiB,
        "seconds_per_step": 0.5,
        "seconds_per_sweep": 1.0,
    }
    lines = printed(measured_table([row(**taken), row(offload="cpu")]))
    measured, alone = [cells(line) for line in lines if "fused none" in line]
    assert measured == ["fused none", "2", "1.00", "2.00", "-50.0%", "500", "1000"]
    assert alone == ["fused none", "2, offload", "1.00"] + [""] * 4


def test_the_longest_of_measured_rows_fits_a_line():
    taken = {"measured_allocated_bytes": GiB // 2}
    times = {"seconds_per_step": 12.3, "seconds_per_sweep": 98.7}
    lines = printed(
        measured_table([row(num_blocks=12, recompute="attention", offload="cpu", **taken, **times)])
    )
    assert cells(lines[-1])[:2] == ["fused attention", "12, offload"]


def test_end_to_end_has_one_line_whatever_is_on_the_device():
    rows = [row("end_to_end", 1, None, offload=name) for name in ("none", "cpu")]
    for tables in (predicted_tables(rows), measured_table(rows)):
        for table in tables:
            lines = [cells(line) for line in printed([table]) if line.strip().startswith("end")]
            assert [line[0] for line in lines] in (["end to end"], ["end to end, 1"])


def test_what_could_not_be_measured_is_said_once_with_its_reason():
    lost = {"not_measured": "too large"}
    rows = [row("end_to_end", 1, None, place, **lost) for place in ("none", "cpu")]
    rows += [row(), row(offload="cpu", **lost)]
    assert list(not_measured(rows)) == [
        "end to end, 1 was not measured: too large",
        "fused none, 2, offload was not measured: too large",
    ]
