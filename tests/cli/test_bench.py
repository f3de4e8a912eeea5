import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from cli.runs import Lock, refused, until

from dbkernels.cli import bench
from dbkernels.cli.bench_jobs import Job

MACHINE = 'print(\'{"device": "epyc", "commit": "abc"}\')'
PROGRAM = """if True:
    import pathlib, sys
    here, name = pathlib.Path(__file__).parent, sys.argv[2]
    with open(here / "calls.txt", "a") as calls:
        print(*sys.argv[1:], file=calls)
    print('{"row": 1}')
    if (here / name).exists():
        raise SystemExit((here / name).read_text())
    print('{"row": 2}')
"""
SLOW = """if True:
    import fcntl, pathlib, time
    lock = open(pathlib.Path(__file__).with_name("lock"), "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    print('{"row": 1}', flush=True)
    time.sleep(300)
"""
BENCH = """if True:
    import pathlib, sys
    from dbkernels.cli import bench, main
    from dbkernels.cli.bench_jobs import Job
    bench.CHECKOUT = pathlib.Path({root!r})
    bench.jobs = lambda full, on_gpu: [Job("one", "case.py", ("one",), 1)]
    main.main(["bench", "--device", "cpu", *sys.argv[1:]])
"""
REPORT = """if True:
    import pathlib, sys
    results, flag, page = sys.argv[1:]
    assert flag == "--out"
    names = sorted(file.name for file in pathlib.Path(results).rglob("*.jsonl"))
    pathlib.Path(page).write_text(" ".join(names))
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose benchmarks print two rows; a file of a case's name makes it fail."""
    root = tmp_path / "checkout"
    for folder in ("benchmarks", "tools"):
        (root / folder).mkdir(parents=True)
    (root / "benchmarks" / "machine.py").write_text(MACHINE)
    (root / "benchmarks" / "case.py").write_text(PROGRAM)
    (root / "tools" / "report.py").write_text(REPORT)
    monkeypatch.setattr(bench, "CHECKOUT", root)
    made = [Job(name, "case.py", (name,), 1) for name in ("one", "two", "three")]
    monkeypatch.setattr(bench, "jobs", lambda full, on_gpu: made)
    return root / "benchmarks"


def calls(checkout):
    return (checkout / "calls.txt").read_text().split("\n")[:-1]


def test_rows_of_every_case_are_there_by_device_and_commit(cli, checkout, tmp_path):
    outcome = cli("bench", "--out", "out", "--device", "cpu")
    assert outcome.code == 0, outcome
    place = tmp_path / "out" / "epyc" / "abc"
    assert sorted(file.name for file in place.iterdir()) == [
        "one.jsonl",
        "three.jsonl",
        "two.jsonl",
    ]
    assert [json.loads(line) for line in (place / "one.jsonl").open()] == [{"row": 1}, {"row": 2}]
    assert calls(checkout)[0] == "--json one --device cpu"
    assert re.findall(r"^(\w+): 2 rows in \d s$", outcome.out, re.MULTILINE) == [
        "one",
        "two",
        "three",
    ]
    report = tmp_path / "out" / "report.html"
    assert f"report: {report}\n" in outcome.out
    assert report.read_text() == "one.jsonl three.jsonl two.jsonl"


def test_the_number_of_threads_reaches_the_benchmarks(cli, checkout):
    cli("bench", "--out", "out", "--device", "cpu", "--threads", "2")
    assert calls(checkout)[0] == "--json one --device cpu --threads 2"


def test_a_case_that_fails_is_named_and_does_not_stop_the_others(cli, checkout, tmp_path):
    (checkout / "two").write_text("[no] memory")
    outcome = cli("bench", "--out", "out", "--device", "cpu")
    assert outcome.code == 1
    assert re.search(r"^two failed after \d s: \[no\] memory$", outcome.out, re.MULTILINE)
    assert outcome.out.endswith("error: failed: two\n")
    place = tmp_path / "out" / "epyc" / "abc"
    assert (place / "three.jsonl").exists() and not (place / "two.jsonl").exists()
    # the rows that came are there to be read, and are no result
    assert (place / "two.part").read_text() == '{"row": 1}\n'


def test_what_is_finished_is_not_run_again(cli, checkout):
    (checkout / "two").write_text("no memory")
    cli("bench", "--out", "out", "--device", "cpu")
    (checkout / "two").unlink()
    outcome = cli("bench", "--out", "out", "--device", "cpu")
    assert outcome.code == 0
    assert "2 of 3 cases are in out/epyc/abc already; --again runs them again." in outcome.out
    assert [call.split()[1] for call in calls(checkout)] == ["one", "two", "three", "two"]
    cli("bench", "--out", "out", "--device", "cpu", "--again")
    assert len(calls(checkout)) == 7


def test_a_run_that_is_stopped_says_so_and_goes_on_with_its_case(cli, checkout, monkeypatch):
    def interrupted(arguments, finished):
        if finished.stem == "two":
            raise KeyboardInterrupt
        return run(arguments, finished)

    run = bench._run
    monkeypatch.setattr(bench, "_run", interrupted)
    outcome = cli("bench", "--out", "out", "--device", "cpu")
    assert outcome.code == 130
    assert outcome.out.endswith("The same command goes on with what was not finished.\n")
    monkeypatch.setattr(bench, "_run", run)
    assert cli("bench", "--out", "out", "--device", "cpu").code == 0
    assert [call.split()[1] for call in calls(checkout)] == ["one", "two", "three"]


def test_sigterm_ends_a_run_as_ctrl_c_does(cli, checkout, tmp_path):
    (checkout / "case.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-c", BENCH.format(root=str(checkout.parent)), "--out", "out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    lock = Lock(checkout / "lock")
    part = tmp_path / "out" / "epyc" / "abc" / "one.part"
    until(lambda: part.exists() and part.read_text())
    assert not lock.is_free()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == "Stopped. The same command goes on with what was not finished.\n"
    until(lock.is_free)
    assert [file.name for file in part.parent.iterdir()] == ["one.part"]
    assert part.read_text() == '{"row": 1}\n'
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["epyc"]
    (checkout / "case.py").write_text(PROGRAM)
    assert cli("bench", "--out", "out", "--device", "cpu").code == 0
    assert (part.parent / "one.jsonl").exists() and not part.exists()


def test_a_report_that_fails_is_named(cli, checkout):
    (checkout.parent / "tools" / "report.py").write_text("raise SystemExit('no matplotlib')")
    outcome = cli("bench", "--out", "out", "--device", "cpu")
    assert outcome.code == 1
    assert "report failed: no matplotlib\n" in outcome.out
    assert outcome.out.endswith("error: failed: report\n")


def test_nothing_is_reported_on_nothing(cli, checkout):
    for name in ("one", "two", "three"):
        (checkout / name).write_text("")
    outcome = cli("bench", "--out", "out", "--device", "cpu")
    assert outcome.code == 1 and "report" not in outcome.out
    assert "one failed after 0 s: it said nothing" in outcome.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--quick --full", "bench is quick or full, got both"),
        ("--threads -1", "threads must be at least 0, got -1"),
        ("--device tpu", "device must be auto, cpu or cuda, got tpu"),
    ],
)
def test_rejects(cli, checkout, flags, message):
    assert refused(cli("bench", *flags.split()), message)


def test_an_installed_package_says_that_it_has_no_benchmarks(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert refused(cli("bench", "--device", "cpu"), "bench needs a checkout of the repository")
    assert not (tmp_path / "runs").exists()


def test_a_gpu_has_jobs_of_its_own(cli, checkout, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(bench, "jobs", lambda **how: asked.append(how) or [])
    cli("bench", "--full")
    assert asked == [{"full": True, "on_gpu": True}]
