"""Checkpoints that a thread writes: the bits of the call, when they count, and how they fail."""

import errno
import threading
from pathlib import Path

import pytest
import torch
from training.checkpoints import assert_holds, bits, names, numbered, saved
from training.tiny import assert_same

from dbkernels import whole_file
from dbkernels.training import checkpoint
from dbkernels.training.checkpoint import Saver, latest, load, save
from dbkernels.training.checkpoint.host_copy import HostCopy
from dbkernels.training.checkpoint.part import part_of
from dbkernels.training.log import RunLog, read_log
from dbkernels.training.tensor_file import pieces

SECONDS = 20  # in which a thread does what it is waited for


@pytest.fixture
def gate(monkeypatch):
    """Holds back every file of a save until it is set."""
    gate, new_file = threading.Event(), whole_file.new_file

    def held_back(path):
        assert gate.wait(SECONDS)
        return new_file(path)

    monkeypatch.setattr(whole_file, "new_file", held_back)
    yield gate
    gate.set()


@pytest.fixture
def full_disk(monkeypatch):
    def refuse(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(whole_file, "new_file", refuse)
        yield patch


# the bits of the call


def test_what_is_saved_is_what_there_was_at_the_call(tmp_path, gate):
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "model": {
            "base": base,
            "turned": base.t(),
            "every": base[:, ::2],
            "expanded": base[:1].expand(3, 4),
            "negated": torch.complex(base, base).conj().imag,
            "parameter": torch.nn.Parameter(base.clone()),
            "half": base.to(torch.bfloat16),
            "flags": base > 5,
            "none": torch.empty(0, 3),
        },
        "optimizer": {"step": torch.tensor(5.0)},
        "ema": {},
    }
    state = {"step": 1, "place": [1, 2]}
    groups = {group: dict(named) for group, named in tensors.items()}
    with Saver() as saver:
        gate.set()
        path = save(tmp_path / "call", 1, groups, {"step": 1, "place": [1, 2]})
        saver.save(tmp_path / "thread", 1, tensors, state)
        saver.wait()
        gate.clear()
        saver.save(tmp_path / "thread", 1, tensors, state)
        # all of it is changed while it is not yet written
        for named in groups.values():
            for tensor in named.values():
                with torch.no_grad():
                    if tensor is not groups["model"]["expanded"]:
                        tensor.zero_()
        tensors["model"].clear(), tensors.clear(), state["place"].clear()
        gate.set()
    again = latest(tmp_path / "thread")
    assert names(again) == names(path)
    assert all((again / n).read_bytes() == (path / n).read_bytes() for n in names(path))


def test_a_later_copy_lies_in_the_memory_of_the_one_before(tmp_path):
    host = HostCopy()

    def copied(*sizes):
        named = {str(size): torch.full((size,), float(size)) for size in sizes}
        part = host.of(part_of({"model": named}, 0, 1), pieces)
        assert bits(part.tensors) == bits({"model": named})
        return [tensor.data_ptr() for tensor in part.tensors["model"].values()]

    first = copied(300, 400)
    assert copied(300, 400) == first and copied(20, 500) == [first[0], first[0] + 512]
    assert len(copied(3, 4, 5000)) == 3


def test_the_bytes_of_a_tensor_are_read_before_the_call_returns(tmp_path):
    def read(tensor):
        readers.append(threading.current_thread())
        for piece in pieces(tensor + 1):
            yield from piece.split(5)

    readers, w = [], torch.arange(7.0)
    with Saver() as saver:
        saver.save(tmp_path, 1, {"model": {"w": w}}, {}, read=read)
        assert readers == [threading.current_thread()]
    assert torch.equal(load(latest(tmp_path))[0]["model"]["w"], w + 1)


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_copied_to_locked_pages_as_they_are_at_the_call(tmp_path, gpu, size):
    side = size(2048, 8)
    w = torch.arange(side**2, device=gpu, dtype=torch.float32).view(side, side)
    named = {"w": w, "turned": w.t(), "host": torch.ones(3)}
    expected = {name: tensor.cpu().contiguous().clone() for name, tensor in named.items()}
    host = HostCopy()
    copies = host.of(part_of({"model": named}, 0, 1), pieces).tensors["model"]
    assert copies["w"].is_pinned() == (gpu.type == "cuda")
    with Saver() as saver:
        for step in (1, 2):
            saver.save(tmp_path, step, {"model": named}, {})
        w.zero_()
    for path in tmp_path.iterdir():
        found = load(path)[0]["model"]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# when it counts


def test_a_checkpoint_counts_when_it_is_durable_and_not_before(tmp_path, gate):
    with Saver() as saver:
        gate.set()
        saved(tmp_path, 1)
        gate.clear()
        saver.save(tmp_path, 2, *numbered(2))
        saver.check()
        assert latest(tmp_path).name == "step-00000001"
        gate.set()
        saver.wait()
        assert_holds(latest(tmp_path), 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_save_waits_for_the_one_before(tmp_path, gate):
    with Saver() as saver:
        saver.save(tmp_path, 1, *numbered(1))
        second = threading.Thread(target=saver.save, args=(tmp_path, 2, *numbered(2)))
        second.start()
        second.join(0.2)
        assert second.is_alive() and latest(tmp_path) is None
        gate.set()
        second.join()
        assert_holds(tmp_path / "step-00000001", 1)
    assert_holds(latest(tmp_path), 2)


def test_the_newest_are_kept(tmp_path):
    with Saver() as saver:
        for step in range(1, 6):
            saver.save(tmp_path, step, *numbered(step), keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


# how it fails


def settled(saver):
    """Wait for the thread, without what it has to say."""
    saver._saving.exception(SECONDS)


@pytest.mark.parametrize(
    "call",
    [Saver.check, Saver.wait, Saver.close, lambda saver: saver.save(Path("root"), 3, {}, {})],
    ids=["check", "wait", "close", "save"],
)
def test_an_error_is_that_of_a_save_and_is_raised_once(tmp_path, monkeypatch, full_disk, call):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as expected:
        save(Path("root"), 2, *numbered(2))
    saver = Saver()
    saver.save(Path("root"), 2, *numbered(2))
    settled(saver)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*2: No space left") as caught:
        call(saver)
    assert str(caught.value) == str(expected.value) and caught.value.errno == errno.ENOSPC
    assert names(Path("root")) == []
    saver.check(), saver.wait(), saver.close()


def test_after_an_error_the_next_save_is_one(tmp_path, full_disk):
    with Saver() as saver:
        saver.save(tmp_path, 2, *numbered(2))
        settled(saver)
        with pytest.raises(OSError, match="No space left"):
            saver.check()
        full_disk.undo()
        saver.save(tmp_path, 3, *numbered(3))
    assert names(tmp_path) == ["step-00000003"]
    assert_holds(latest(tmp_path), 3)


def cut_short(tensor):
    raise ValueError("a block's file was cut short")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"step": -1}, ValueError, "step must be an integer of at least 0, got -1"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"state": {"a": threading.Lock()}}, ValueError, r"state\.a must be a value that JSON has"),
        ({"tensors": {"a": {"b": 1.0}}}, ValueError, r"a\.b must be a tensor, got float"),
        ({"read": cut_short}, ValueError, "a block's file was cut short"),
        ({"finite": ["model"]}, FloatingPointError, "weights must be finite to be saved, got .* w"),
    ],
)
def test_what_a_save_refuses_is_told_too_and_nothing_is_left(tmp_path, changes, kind, message):
    tensors = {"model": {"w": torch.tensor([float("nan")])}}
    (tmp_path / "root").mkdir()
    with pytest.raises(kind, match=message), Saver() as saver:
        options = {"step": 1, "tensors": tensors, "state": {}} | changes
        saver.save(tmp_path / "root", **options)
    assert names(tmp_path / "root") == []


def test_the_error_that_ends_a_run_is_told_before_that_of_its_checkpoint(tmp_path, full_disk):
    class Ended(Exception):
        pass

    lost = pytest.warns(UserWarning, match="the last checkpoint is lost: cannot write")
    with lost, pytest.raises(Ended), Saver() as saver:
        saver.save(tmp_path, 2, *numbered(2))
        raise Ended


# in a run


def test_a_run_that_saves_beside_its_steps_leaves_what_any_run_leaves(make_config, train):
    for where in ({}, {"offload": "disk", "offload_dir": "off", "prefetch": True}):
        config = make_config("dit", steps=3, **where)
        one = train(config, f"one{len(where)}", save_every=2, keep=9)
        two = train(config, f"two{len(where)}", save_every=2, keep=9, save_async=True)
        assert_same(two, one)
        first, second = (Path(f"{n}{len(where)}/checkpoints") for n in ("one", "two"))
        assert names(first) == names(second) == [f"step-{n:08d}" for n in (2, 4, 6, 8, 9)]
        for name in names(first):
            assert bits(load(first / name)[0]) == bits(load(second / name)[0])


def test_a_run_ends_at_the_step_after_a_checkpoint_was_refused_and_tries_once_more(
    make_config, train, monkeypatch
):
    check, new_file = Saver.check, whole_file.new_file

    def full(path):
        if "step-00000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return new_file(path)

    def check_behind_the_thread(saver):
        if saver.busy:
            settled(saver)
        check(saver)

    monkeypatch.setattr(whole_file, "new_file", full)
    monkeypatch.setattr(Saver, "check", check_behind_the_thread)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*step-00000002: No space left"):
        train(make_config("dit", steps=30), save_every=2, save_async=True)
    assert [row["step"] for row in read_log(Path("run/log.jsonl"))] == [0, 1, 2]
    assert names(Path("run/checkpoints")) == ["step-00000003"]
    checkpoint.load(latest(Path("run/checkpoints")))


@pytest.mark.parametrize("refused", [False, True])
def test_a_run_is_not_at_its_end_before_its_last_checkpoint_is(
    make_config, train, monkeypatch, refused
):
    told, new_file = [], whole_file.new_file

    def refuse(path):
        if refused and "step-00000009" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return new_file(path)

    monkeypatch.setattr(whole_file, "new_file", refuse)
    monkeypatch.setattr(RunLog, "close", lambda log, *, finished: told.append(finished))
    config = make_config("dit", steps=3)
    if refused:
        with pytest.raises(OSError, match=r"cannot write checkpoint .*-00000009: No space left"):
            train(config, save_async=True)
    else:
        # the last step has been saved before, and is still written
        train(config, save_async=True, save_every=3)
    assert told == [not refused]
    assert (latest(Path("run/checkpoints")) is None) == refused
