import io

import pytest
from rich.console import Console

from dbkernels.cli.bench_bar import Bar, Pace


def test_time_left_is_what_was_thought_until_one_is_done():
    pace = Pace([10, 20, 30])
    pace.begin(100)
    assert pace.left(104) == 56
    assert pace.left(115) == 50


def test_time_left_follows_the_pace_of_what_is_done():
    pace = Pace([10, 20, 30])
    pace.begin(0)
    assert pace.end(20) == 20
    # what happens between two of them is no one's
    pace.begin(50)
    assert pace.left(60) == 30 + 60
    pace.end(60)
    pace.begin(60)
    assert pace.left(60) == pytest.approx(30 * 30 / 30)


def test_the_bar_shows_what_runs_what_is_done_and_the_time_left():
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with Bar([120, 60], done=3, console=terminal) as bar:
        bar.begin("ops")
        bar._progress.refresh()
        assert 0 <= bar.end() < 5
        bar.begin("layer")
    shown = terminal.file.getvalue()
    assert "3/5 about 3:00 left ops" in shown
    assert "4/5" in shown and "left layer" in shown


def test_nothing_is_shown_where_there_is_no_terminal():
    console = Console(file=io.StringIO())
    with Bar([1], done=0, console=console) as bar:
        bar.begin("ops")
        bar.end()
    assert not console.file.getvalue().strip()
