import errno
import hashlib
import itertools
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.checkpoints import assert_holds, bits, names, numbered, saved

from dbkernels import whole_file
from dbkernels.training.checkpoint import latest, load, save

FLOATS = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e16, 1e-7, 2.0]
STATE = {"floats": FLOATS, "small": 1e-05, "data": {"order": [1, "é"], "done": None}}
# NaN with a payload and signed zeros: == on values would miss a change of their bits
TENSORS = {
    "model": {
        "bfloat16": torch.tensor([0x7FC1, 0x3F80, -1], dtype=torch.int16).view(torch.bfloat16),
        "float16": torch.tensor([6e-8, -0.0, math.inf], dtype=torch.float16),
        "float32": torch.tensor([[1e-45, 1 / 3, -0.0]]),
        "int64": torch.tensor([2**62 + 1, -(2**63)]),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
    },
    "optimizer": {"step": torch.tensor(5.0)},
    "ema": {},
}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def assert_refused(path, message):
    with pytest.raises(ValueError, match=message):
        load(path)


def test_returns_every_bit_that_was_saved(tmp_path):
    state = STATE | {"tuple": (1, 2)}
    path = save(tmp_path / "new" / "root", 123, TENSORS, state)
    assert path == tmp_path / "new" / "root" / "step-00000123"
    tensors, state = load(path)
    assert tensors.keys() == TENSORS.keys() and state == STATE | {"tuple": [1, 2]}
    assert [value.hex() for value in state["floats"]] == [value.hex() for value in FLOATS]
    assert bits(tensors) == bits(TENSORS)
    assert list(tensors["model"]) == sorted(TENSORS["model"])


def test_views_of_one_storage_and_any_strides_come_back_equal(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"base": base, "same": base, "t": base.t(), "row": base[1], "every": base[:, ::2]}
    views |= {"parameter": torch.nn.Parameter(base), "expanded": base[:1].expand(3, 4)}
    views["negated"] = torch.complex(base, base).conj().imag  # lazily: its bytes are those of base
    tensors, _ = load(save(tmp_path, 0, {"model": views}, {}))
    assert all(torch.equal(tensors["model"][name], view) for name, view in views.items())
    tensors["model"]["base"].zero_()
    assert torch.equal(tensors["model"]["same"], base)


def test_files_are_what_the_format_says(tmp_path):
    path = save(tmp_path / "a", 7, numbered(7)[0], STATE)
    manifest = json.loads((path / "state.json").read_text())
    digest = manifest.pop("self")
    assert digest == sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
    data = {name: (path / name).read_bytes() for name in ("ema.safetensors", "model.safetensors")}
    files = {name: {"bytes": len(d), "sha256": sha256(d)} for name, d in data.items()}
    assert manifest == {"format": 1, "step": 7, "state": STATE, "files": files}
    assert names(path) == [*files, "state.json"]
    mode = path.stat().st_mode & 0o666  # as the umask has it
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {mode}
    again = save(tmp_path / "b", 7, numbered(7)[0], STATE)
    assert (again / "state.json").read_bytes() == (path / "state.json").read_bytes()


def test_latest_is_the_newest_complete_published_checkpoint(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "missing") is None
    saved(tmp_path, 100_000_000, 99_999_999, 5)
    for name in (".step-200000000-1", "step-11", "step-200000000.old", "step-200000000x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    (tmp_path / "step-200000001").mkdir()
    assert latest(tmp_path).name == "step-100000000"


def test_keeps_the_newest_and_what_was_just_saved(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, *numbered(step))
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert_holds(*saved(tmp_path, 1, keep=2), 1)
    assert names(tmp_path) == ["step-00000001", "step-00000004"]
    saved(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000002"]


def test_prunes_a_link_without_touching_what_it_points_to(tmp_path):
    (elsewhere,) = saved(tmp_path / "elsewhere", 1)
    (root := tmp_path / "root").mkdir()
    (root / "step-00000001").symlink_to(elsewhere)
    assert_holds(latest(root), 1)
    saved(root, 2, keep=1)
    assert names(root) == ["step-00000002"]
    assert_holds(elsewhere, 1)


def test_everything_is_durable_before_it_is_published(tmp_path, monkeypatch):
    events, rename = [], os.rename

    def record_rename(source, target):
        events.append(f"publish {target.name}")
        rename(source, target)

    def record_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "fsync", record_fsync)
    saved(tmp_path / "root", 1)
    files = ["model.safetensors", "ema.safetensors", "state.json", f".step-00000001-{os.getpid()}"]
    assert events == [tmp_path.name, *files, "publish step-00000001", "root"]


def save_until_call(number, root, step):
    touches = {"open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir"}
    calls = itertools.count()
    sys.addaudithook(lambda name, _: name in touches and next(calls) == number and os._exit(9))
    save(root, step, *numbered(3))
    os._exit(0)


def kill_everywhere(folder, step):
    """Kill a child before each call that touches the disk, in turn, until a child finishes."""
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote
    for number in itertools.count():
        root = folder / f"{step}-{number:03d}"
        saved(root, 1, 2)
        child = os.fork()
        if child == 0:
            save_until_call(number, root, step)
        if os.waitpid(child, 0)[1] == 0:
            return


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    script = "import pathlib, runpy, sys\nkill = runpy.run_path(sys.argv[1])['kill_everywhere']\n"
    script += "for step in (2, 3): kill(pathlib.Path(sys.argv[2]), step)"
    environment = {
        "PYTHONPATH": ":".join(map(str, Path(__file__).parents[1:3])),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", script, __file__, str(tmp_path)]
    # a child of one thread: a fork of this process, which has more, might hang
    subprocess.run(command, env=os.environ | environment, check=True)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for step in (2, 3):  # saving 2 replaces a checkpoint
        values = []
        for root in sorted(tmp_path.glob(f"{step}-*")):
            values.append(load(latest(root))[1]["step"])
            saved(root, 4, keep=2)
            kept = f"step-0000000{2 if step == 2 else values[-1]}"
            assert names(root) == [kept, "step-00000004"]
            assert_holds(root / kept, values[-1])
        assert len(values) > 15 and values == sorted(values) and set(values) == {2, 3}


def test_cleans_up_after_dead_runs_only(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    others = [f".step-00000002-{os.getppid()}", ".mine", ".step-2-x"]
    dead = [f".step-00000002-{ended.pid}", f".step-00000001.replaced-{ended.pid}"]
    for name in (f".step-00000002-{os.getpid()}", *dead, *others):
        (tmp_path / name).mkdir()
    saved(tmp_path, 2)
    assert names(tmp_path) == sorted([*others, "step-00000002"])


@pytest.mark.parametrize("step", [1, 2])  # 1 replaces a checkpoint
@pytest.mark.parametrize("fails", [".step-0000000{}-{}", "ema.safetensors", "step-0000000{}"])
def test_a_disk_that_refuses_leaves_the_earlier_checkpoints(tmp_path, monkeypatch, fails, step):
    before = [(path, [f.read_bytes() for f in path.iterdir()]) for path in saved(tmp_path, 0, 1)]
    refused = [fails.format(step, os.getpid())]

    def refuse(real, target):
        def call(*args):
            if args[target].name in refused:
                refused.clear()
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        return call

    monkeypatch.setattr(os, "mkdir", refuse(os.mkdir, 0))
    monkeypatch.setattr(os, "rename", refuse(os.rename, 1))
    monkeypatch.setattr(whole_file, "new_file", refuse(whole_file.new_file, 0))
    with pytest.raises(OSError, match="No space left") as caught:
        saved(tmp_path, step, keep=1)
    assert caught.value.errno == errno.ENOSPC
    assert [(path, [f.read_bytes() for f in path.iterdir()]) for path, _ in before] == before
    assert names(tmp_path) == ["step-00000000", "step-00000001"]


def test_an_error_inside_the_writer_names_the_checkpoint(tmp_path):
    saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write checkpoint .*step-00000002: .*large"):
            save(tmp_path, 2, {"model": {"w": torch.zeros(10_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_every_bit_and_every_length_counts(tmp_path, name):
    path = save(tmp_path, 1, {"model": {"w": torch.ones(1)}}, {"rate": 1e-05, "name": "é"})
    whole = (path / name).read_bytes()
    changes = [
        whole[:index] + bytes([byte ^ 1 << bit]) + whole[index + 1 :]
        for index, byte in enumerate(whole)
        for bit in range(8)
    ]
    changes += [(whole + b"\0")[:size] for size in (len(whole) + 1, *range(len(whole)))]
    for changed in changes:
        (path / name).write_bytes(changed)
        found = f"sha256 {sha256(whole)}, got {sha256(changed)}$"
        if len(changed) != len(whole):
            found = f"bytes {len(whole)}, got {len(changed)}$"
        found = found if name == "model.safetensors" else ""
        assert_refused(path, f"^checkpoint {path}: {name}: expected {found}")
    (path / name).write_bytes(whole)
    load(path)


def test_files_of_other_checkpoints_count(tmp_path):
    paths = saved(tmp_path, 1, 2, 3)
    for path, name in zip(paths[1:], ["model.safetensors", "state.json"], strict=True):
        (path / name).write_bytes((paths[0] / name).read_bytes())
        assert_refused(path, rf"{path.name}: .*; the previous checkpoint step-00000001 is intact$")
    moved = paths[0].rename(tmp_path / "step-00000009")
    assert_refused(moved, r"state.json: expected step 9, got step 1")
    assert_holds(moved.rename(tmp_path / "best"), 1)


STATES = ["[]", "3", "null", "{", "[" * 100_000, '{"format":3}']
OTHER_STATE = r"state.json: expected (a JSON object|format 1 or 2), got "


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ema.safetensors", None, "ema.safetensors: expected a file, got none"),
        ("x.safetensors", "", "x.safetensors: expected no file that state.json does not list, got"),
        ("state.json", None, "is not a checkpoint: .*got a directory without it$"),
        *(("state.json", text, OTHER_STATE) for text in STATES),
    ],
    ids=range(3 + len(STATES)),
)
def test_a_missing_or_unlisted_file_and_a_state_of_another_kind_are_refused(
    tmp_path, name, text, message
):
    (path,) = saved(tmp_path, 1)
    (path / name).unlink() if text is None else (path / name).write_text(text)
    assert_refused(path, message)
    for other in (path / name, tmp_path / "missing"):
        assert_refused(other, rf"{other.name} is not a checkpoint: .*got no directory$")


def test_points_to_the_nearest_intact_checkpoint(tmp_path):
    paths = saved(tmp_path, 1, 2, 3, 4, 5)
    assert_refused(tmp_path / "step-00000006", "not a checkpoint.* step-00000005 is intact$")
    for index, hint in [(2, "2"), (3, "2"), (1, "1"), (0, "5")]:
        (paths[index] / "model.safetensors").write_bytes(b"")
        assert_refused(paths[index], f"; the previous checkpoint step-0000000{hint} is intact$")
    (paths[4] / "ema.safetensors").unlink()
    assert_refused(paths[3], r"got 0$")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"step": -1}, "step must be an integer of at least 0, got -1"),
        ({"step": 1.0}, r"step must be an integer of at least 0, got 1\.0"),
        ({"state": [1]}, "state must be a dict, got list"),
        ({"state": {"a": [0, math.nan]}}, r"state\.a\[1\] must be a finite number, got nan"),
        ({"state": {"a": -math.inf}}, r"state\.a must be a finite number, got -inf"),
        ({"state": {"a": {1: 2}}}, r"keys of state\.a must be strings, got 1"),
        ({"state": {"a": torch.ones(1)}}, r"state\.a must be a value that JSON has, got Tensor"),
        ({"tensors": {"../a": {}}}, r"letters, digits, _ and -, got '\.\./a'"),
        ({"tensors": {"a": {"__metadata__": torch.ones(1)}}}, "a has a tensor named __metadata__"),
        ({"tensors": {"a": {"b": 1.0}}}, r"a\.b must be a tensor, got float"),
        ({"tensors": {"a": {"b": torch.ones(1).to_sparse()}}}, r"a\.b must be dense .*sparse"),
        ({"tensors": {"a": {"b": torch.ones(1, device="meta")}}}, r"DTYPES, got .*meta"),
        ({"tensors": {"a": {"b": torch.ones(1, dtype=torch.complex128)}}}, "got torch.complex128"),
    ],
)
def test_save_rejects(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "root", **{"step": 1, "tensors": {}, "state": {}} | changes)
    assert not (tmp_path / "root").exists()
