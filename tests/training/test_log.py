import builtins
import json

import pytest

from dbkernels.training.log import RunLog, read_log


def row(step, block=0, loss=1.5):
    return {"step": step, "block": block, "loss": loss}


def test_rows_come_back_as_they_were_written(tmp_path):
    log = RunLog(tmp_path / "run")
    rows = [row(0), row(1, loss=0.1 + 0.2)]
    for each in rows:
        log.write(each)
    log.close()
    assert read_log(tmp_path / "run" / "log.jsonl") == rows


def test_every_row_is_on_disk_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path)
    log.write(row(0))
    assert read_log(tmp_path / "log.jsonl") == [row(0)]
    log.close()


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
    log = RunLog(tmp_path)
    for step in range(5):
        log.write(row(step))
    log.close()
    log = RunLog(tmp_path, first_step=3)
    log.write(row(3, loss=9.0))
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [row(0), row(1), row(2), row(3, loss=9.0)]


def test_a_last_row_cut_short_is_not_read(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(row(0)) + '\n{"step": 1, "lo')
    assert read_log(tmp_path / "log.jsonl") == [row(0)]


def test_tensorboard_gets_every_number_of_every_block(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, tensorboard=True)
    log.write(row(0, block=0, loss=1.0))
    log.write(row(1, block=2, loss=3.0))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss/block0", "loss/block2"]
    assert [(e.step, e.value) for e in events.Scalars("loss/block2")] == [(1, 3.0)]


def test_missing_tensorboard_is_said_before_anything_is_written(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install dbkernels\[tensorboard\]"):
        RunLog(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
