import errno
import json
import warnings

import pytest

from dbkernels.training.log import RunLog, read_log


def row(step, block=0, loss=1.5):
    return {"step": step, "block": block, "loss": loss}


def test_rows_are_on_disk_at_once_and_a_resumed_run_drops_what_it_does_again(tmp_path):
    rows = [row(step, loss=0.1 + 0.2) for step in range(5)]
    log = RunLog(tmp_path / "run")
    for each in rows:
        log.write(each)
    assert read_log(tmp_path / "run" / "log.jsonl") == rows
    log.close()
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        # a row that was cut short is not read
        file.write('{"step": 1, "lo')
    log = RunLog(tmp_path / "run", first_step=3)
    log.write(row(3, loss=9.0))
    log.close()
    assert read_log(tmp_path / "run" / "log.jsonl") == [*rows[:3], row(3, loss=9.0)]


def test_damaged_rows_are_left_out_and_counted(tmp_path):
    good, bad = row(0), [b"\0" * 40, b"\xff{}", b"{}", b"5", b"[" * 10**5, b'{"step": "1"}', b""]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*bad, json.dumps(good).encode(), b""]))
    with pytest.warns(UserWarning, match="log.jsonl has 7 damaged rows, which are left out"):
        RunLog(tmp_path, first_step=1).close()
    assert read_log(tmp_path / "log.jsonl") == [good]


def test_a_directory_has_one_open_log_and_another_after_it(tmp_path):
    first = RunLog(tmp_path)
    first.write(row(0))
    with pytest.raises(ValueError, match="must have one writer, got another that goes on"):
        RunLog(tmp_path, first_step=1)
    first.close()
    RunLog(tmp_path, first_step=1).close()
    assert read_log(tmp_path / "log.jsonl") == [row(0)]


def test_a_log_that_cannot_be_read_leaves_the_directory_free(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        RunLog(tmp_path)
    (tmp_path / "log.jsonl").rmdir()
    RunLog(tmp_path).close()


def test_a_file_system_without_locks_holds_a_log(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    RunLog(tmp_path).close()


def test_a_log_of_a_run_without_a_checkpoint_is_kept_and_the_warning_says_where(tmp_path):
    for count in (3, 2, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log = RunLog(tmp_path)
        for step in range(count):
            log.write(row(step, loss=float(count)))
        log.close()
    with pytest.warns(UserWarning, match=r"without a checkpoint: it is kept as log-3\.jsonl"):
        RunLog(tmp_path).close()
    kept = [read_log(tmp_path / f"log-{number}.jsonl") for number in (1, 2, 3)]
    assert [[each["loss"] for each in rows] for rows in kept] == [[3.0] * 3, [2.0] * 2, [1.0]]
    assert read_log(tmp_path / "log.jsonl") == []
    # an empty one is nothing to keep
    RunLog(tmp_path).close()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_second_writer_leaves_nothing_beside_a_log_that_goes_on(tmp_path):
    first = RunLog(tmp_path, track=["tensorboard"])
    first.write(row(0))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="must have one writer"):
        RunLog(tmp_path, track=["tensorboard"])
    assert sorted(tmp_path.rglob("*")) == before
    first.close()
