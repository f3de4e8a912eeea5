"""`python benchmarks/run.py`: its jobs, and how a run ends, goes on and reports."""

import importlib
import io
import json
import re
import signal
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

import pytest
import torch
import tyro
from cli.runs import Lock, until
from rich.console import Console

ROOT = Path(__file__).parents[2]
TWO_ROWS = re.compile(r"^(\w+): 2 rows$", re.MULTILINE)
# writes two rows but for those that are there; a file of the case's name makes it fail between
PROGRAM = """if True:
    import fcntl, json, pathlib, subprocess, sys, time
    here, name, out = pathlib.Path(__file__).parent, sys.argv[1], pathlib.Path(sys.argv[-1])
    with open(here / "calls.txt", "a") as calls:
        print(*sys.argv[1:], file=calls)
    for number in (1, 2):
        if out.exists() and len(out.read_text().splitlines()) >= number:
            continue
        with out.open("a") as file:
            print(json.dumps({"row": number}), file=file)
        print(number, flush=True)
        if (here / name).exists():
            raise SystemExit((here / name).read_text())
        if (here / "slow").exists():
            lock = open(here / "lock", "w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
            for _ in (here / "slow").read_text():
                subprocess.Popen(sleep, pass_fds=[lock.fileno()], stdout=subprocess.DEVNULL)
            (here / "ready").touch()
            time.sleep(300)
"""
REPORT = """if True:
    import pathlib, sys
    results, flag, page = sys.argv[1:]
    assert flag == "--page"
    names = sorted(file.name for file in pathlib.Path(results).rglob("*.jsonl"))
    pathlib.Path(page).write_text(" ".join(names))
"""
OUTSIDE = """if True:
    import pathlib, signal, sys
    # a shell's background jobs, and what they begin, ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:0] = [{root!r}, {benchmarks!r}]
    import run
    run.CHECKOUT = pathlib.Path({checkout!r})
    run.missing = lambda job, arguments: (1, 2)
    run.commit, run.folder_name = lambda: "abc", lambda device: "epyc"
    run.main(run.Run(out=pathlib.Path({out!r}), device="cpu"), [run.Job("one", "case", 1, "one")])
"""


@pytest.fixture
def checkout(bench, tmp_path, monkeypatch):
    """A checkout with one benchmark and a report."""
    run, root = bench("run"), tmp_path / "checkout"
    for folder, name, text in (("benchmarks", "case", PROGRAM), ("tools", "report", REPORT)):
        (root / folder).mkdir(parents=True)
        (root / folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(run, "CHECKOUT", root)
    monkeypatch.setattr(run, "commit", lambda: "abc")
    monkeypatch.setattr(run, "folder_name", lambda device: "epyc")

    def missing(job, arguments):
        out = Path(arguments[-1])
        return 2 - (len(out.read_text().splitlines()) if out.exists() else 0), 2

    monkeypatch.setattr(run, "missing", missing)
    return root / "benchmarks"


@pytest.fixture
def go(bench, checkout, tmp_path, capsys):
    """Runs three jobs; the exit status, and what was printed."""
    run = bench("run")

    def start(**options):
        every = [run.Job(name, "case", 1, name) for name in ("one", "two", "three")]
        try:
            run.main(run.Run(out=tmp_path / "out", device="cpu", **options), every)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return start


def test_rows_are_there_by_device_and_commit_and_what_fails_alone_is_run_again(
    go, checkout, tmp_path
):
    (checkout / "two").write_text("no memory")
    code, out = go(threads=2)
    assert code == 1 and "two failed: no memory\n" in out and out.endswith("error: failed: two\n")
    assert TWO_ROWS.findall(out) == ["one", "three"]
    (checkout / "two").unlink()
    code, out = go()
    place, report = tmp_path / "out/epyc/abc", tmp_path / "out/report.html"
    assert code == 0 and "two: 1 rows" in out
    assert f"2 of 3 benchmarks are in {place}; --again runs" in out
    names = ["one.jsonl", "three.jsonl", "two.jsonl"]
    assert sorted(file.name for file in place.iterdir()) == names
    assert {file.read_text() for file in place.iterdir()} == {'{"row": 1}\n{"row": 2}\n'}
    assert f"report: {report}\n" in out and report.read_text() == " ".join(names)
    code, out = go(again=True)
    assert code == 0 and TWO_ROWS.findall(out) == ["one", "two", "three"]
    calls = (checkout / "calls.txt").read_text().splitlines()
    assert calls[0] == f"one --device cpu --threads 2 --json --out {place / 'one.jsonl'}"
    jobs = [call.split()[0] for call in calls]
    assert jobs == ["one", "two", "three", "two", "one", "two", "three"]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_however_a_run_ends_nothing_outlives_it_and_it_goes_on(go, checkout, tmp_path, end):
    # a run that is killed can end its program, but not what that began
    (checkout / "slow").write_text("" if end == signal.SIGKILL else "1")
    out = tmp_path / "out"
    paths = {"root": str(ROOT), "benchmarks": str(ROOT / "benchmarks")}
    code = OUTSIDE.format(**paths, checkout=str(checkout.parent), out=str(out))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        until((checkout / "ready").exists)
        lock = Lock(checkout / "lock")
        assert not lock.is_free()
        process.send_signal(end)
        printed, _ = process.communicate(timeout=30)
    until(lock.is_free)
    assert process.returncode == (-signal.SIGKILL if end == signal.SIGKILL else 130)
    if end != signal.SIGKILL:
        assert printed == "Stopped. The same command goes on with what was not measured.\n"
    (checkout / "slow").unlink()
    assert go()[0] == 0
    assert (out / "epyc/abc/one.jsonl").read_text() == '{"row": 1}\n{"row": 2}\n'


def test_a_run_that_was_cut_measures_only_the_rows_that_are_missing(
    bench, run_main, tmp_path, monkeypatch, capsys
):
    run, words = bench("run"), "--op add_noise --samples 1 --impls fused eager --rounds 2"
    monkeypatch.setattr(run, "report", lambda *_: [])
    place = tmp_path / run.folder_name(torch.device("cpu")) / (run.commit() or "no-commit")
    path, job = place / "small.jsonl", run.Job("small", "ops", 1, words)
    run_main("ops", f"{words} --device cpu --threads 1 --out {path}")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:40])
    asked = run.Run(out=tmp_path, device="cpu", threads=1)
    run.main(asked, [job])
    assert "small: 2 rows" in capsys.readouterr().out
    again = path.read_text().splitlines(keepends=True)
    key = itemgetter("shape", "impl")
    assert [key(json.loads(line)) for line in again] == [key(json.loads(line)) for line in lines]
    assert len(again) == 4 and again[:2] == lines[:2]
    run.main(asked, [job])
    assert "1 of 1 benchmarks are in" in capsys.readouterr().out


def test_a_file_that_is_none_of_rows_ends_a_run_with_its_name(bench, tmp_path, capsys):
    run = bench("run")
    path = tmp_path / run.folder_name(bench("program").pick_device("cpu")) / (run.commit() or "")
    path.mkdir(parents=True)
    (path / "small.jsonl").write_text("no row\n")
    with pytest.raises(SystemExit, match="1"):
        run.main(run.Run(out=tmp_path, device="cpu"), [run.Job("small", "timeline", 1)])
    error = "error: .*small.jsonl:1: a line must be one JSON object, got 'no row'"
    assert re.search(error, capsys.readouterr().out)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_richs_own_and_a_terminals_alone(bench, checkout, tmp_path, is_terminal):
    run = bench("run")
    every = [run.Job(name, "case", 1, name) for name in ("one", "two")]
    options = {"force_terminal": is_terminal, "width": 100, "color_system": None}
    console = Console(file=io.StringIO(), **options)
    run.run_all(run.Run(out=tmp_path, device="cpu"), every, console)
    shown = console.file.getvalue()
    if is_terminal:
        assert "0:00:0" in shown and "50%" in shown and "100%" in shown
    else:
        assert shown == "one: 2 rows\ntwo: 2 rows\n"


def test_a_report_that_fails_is_named_and_there_is_none_on_nothing(go, checkout):
    (checkout.parent / "tools" / "report.py").write_text("raise SystemExit('no matplotlib')")
    code, out = go()
    assert code == 1 and "report failed: no matplotlib\n" in out
    assert out.endswith("error: failed: report\n")
    (checkout / "case.py").write_text("raise SystemExit(1)")
    code, out = go(again=True)
    assert code == 1 and "report" not in out and "one failed: it said nothing" in out


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_jobs_take_their_arguments_and_cover_every_model_that_a_gpu_trains(
    bench, tmp_path, full, on_gpu
):
    run = bench("run")
    every = run.jobs(full=full, on_gpu=on_gpu)
    for job in every:
        # it refuses, with its own checks, what it would refuse there; and its rows are told apart
        arguments = job.arguments(run.Run(device="cpu"), tmp_path)
        options = tyro.cli(importlib.import_module(job.program).Options, args=arguments)
        keys = [json.dumps(key, sort_keys=True) for key in options.wanted()]
        assert keys and len(set(keys)) == len(keys)
    names = [job.name for job in every]
    assert len(names) == len(set(names)) and not any("/" in name for name in names)
    assert all(name.startswith("full-" if full else "quick-") for name in names)
    assert [job.program for job in every].count("timeline") == 1
    trained = [job.options.split()[1:4:2] for job in every if job.program == "training"]
    assert all([family, name] in trained for family in run.LARGE for name in run.LARGE[family])
    graphs = [job for job in every if " graph " in job.options]
    assert len(graphs) == (0 if not on_gpu else len(run.LARGE["dit"]) if full else 1)
    assert all(job.name.endswith("-graphs") for job in graphs)
    assert full or sum(job.seconds for job in every) <= 480
