"""Several processes save one checkpoint: what it holds, and how it fails in all of them alike."""

import errno
import hashlib
import json
import random

import pytest
import torch
from training.checkpoints import bits, names
from training.saving_processes import CASES, WHOLE, WORLD, work

from dbkernels.training.checkpoint import Box, Shard, as_json, load, load_latest, save

STEPS = {name: ["step-00000001"] for name in CASES}
STEPS |= {"saves_all": ["step-00000002"]}
STEPS |= {"in_the_background": ["step-00000002", "step-00000003"]}
STEPS |= {"fails_in_the_background": ["step-00000001", "step-00000004"]}
FILES = [f"{group}.{rank}of4.safetensors" for group in ("ema", "model") for rank in range(WORLD)]
DAMAGED = [*FILES, "state.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    context = torch.multiprocessing.get_context("spawn")
    args = f"file://{folder / 'rendezvous'}", folder
    processes = [context.Process(target=work, args=(rank, *args)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, -9, 0]
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    """How a case went on each rank that lived, and what its root had then, by case."""
    found = {}
    for name in CASES:
        files = [folder / f"{name}.{rank}.json" for rank in range(WORLD)]
        found[name] = [json.loads(file.read_text()) for file in files if file.exists()]
    return found


@pytest.fixture
def sharded(folder, tmp_path):
    """A checkpoint of four processes, to damage."""
    path = tmp_path / "step-00000002"
    path.mkdir()
    for file in (folder / "saves_all" / path.name).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def rewritten(path, change):
    """A manifest of other values whose hash is right."""
    manifest = json.loads((path / "state.json").read_text())
    del manifest["self"]
    change(manifest)
    manifest["self"] = hashlib.sha256(as_json(manifest)).hexdigest()
    (path / "state.json").write_bytes(as_json(manifest))


# what is saved


def test_the_whole_comes_back_whatever_the_processes_held_of_it(folder, outcomes):
    tensors, state = load(folder / "saves_all" / "step-00000002")
    assert bits(tensors) == bits({"model": WHOLE, "ema": {"rows": WHOLE["rows"]}})
    assert list(tensors["model"]) == sorted(WHOLE) and state == {"by": 0}
    assert [outcome for outcome, _ in outcomes["saves_all"]] == [["done", "step-00000002"]] * WORLD


def test_each_process_writes_its_own_files_and_nothing_twice(folder):
    path = folder / "saves_all" / "step-00000002"
    assert names(path) == sorted(DAMAGED)
    manifest = json.loads((path / "state.json").read_text())
    assert manifest["format"] == 2 and manifest["ranks"] == WORLD
    assert manifest["files"].keys() == {*FILES}
    assert manifest["pieces"]["ema"] == {
        "rows": {
            "dtype": "F32",
            "shape": [10, 3],
            "boxes": [[r, 0, [3 * r, 0], [min(3, 10 - 3 * r), 3]] for r in range(WORLD)],
        }
    }
    boxes = manifest["pieces"]["model"]["qkv"]["boxes"]
    assert [box for box in boxes if box[0] == 2] == [
        [2, 0, [5, 0], [1, 5]],
        [2, 1, [8, 0], [2, 5]],
    ]
    held = sum((path / name).stat().st_size for name in FILES)
    whole = sum(t.nbytes for t in WHOLE.values()) + WHOLE["rows"].nbytes
    headers = sum(8 + int.from_bytes((path / name).read_bytes()[:8], "little") for name in FILES)
    assert held == whole + headers


def test_any_bit_of_any_file_counts(sharded):
    rng = random.Random(0)
    for name in DAMAGED:
        file = sharded / name
        right = file.read_bytes()
        for _ in range(20):
            wrong = bytearray(right)
            wrong[rng.randrange(len(wrong))] ^= 1 << rng.randrange(8)
            file.write_bytes(wrong)
            with pytest.raises(ValueError, match=f"{sharded}: {name}: expected"):
                load(sharded)
        file.write_bytes(right)
    load(sharded)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_of_another_process_is_refused(sharded, name):
    data = (sharded / name).read_bytes()
    (sharded / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: expected a file, got none"):
        load(sharded)
    other = name.replace("0of4", "3of4") if "0of4" in name else name.replace(name[-16], "0")
    (sharded / name).write_bytes((sharded / other).read_bytes())
    with pytest.raises(ValueError, match=f"{name}: expected (bytes|sha256)"):
        load(sharded)
    (sharded / name).write_bytes(data)
    load(sharded)


# what a manifest may say whose hash is right


def boxes_of(manifest, name):
    return manifest["pieces"]["model"][name]["boxes"]


def without_a_box(manifest):
    boxes_of(manifest, "vector").pop(1)


def a_box_twice(manifest):
    boxes_of(manifest, "vector")[1][2] = [0]


def a_box_of_another_rank(manifest):
    boxes_of(manifest, "vector")[1][0] = 3


def boxes_in_another_order(manifest):
    boxes = boxes_of(manifest, "qkv")
    boxes[0][1], boxes[1][1] = boxes[1][1], boxes[0][1]


def a_tensor_that_no_rank_has(manifest):
    manifest["pieces"]["model"]["rows2"] = manifest["pieces"]["model"]["rows"]


def a_tensor_less(manifest):
    del manifest["pieces"]["model"]["rows"]


def a_tensor_less_that_only_the_first_has(manifest):
    manifest["pieces"]["ema"]["count"] = {"dtype": "F32", "shape": [0], "boxes": []}
    manifest["pieces"]["model"]["count"] = {"dtype": "F32", "shape": [0], "boxes": []}


def another_dtype(manifest):
    manifest["pieces"]["model"]["vector"]["dtype"] = "F64"


def a_larger_whole(manifest):
    manifest["pieces"]["model"]["rows"]["shape"] = [2**40, 3]


def a_whole_of_no_size(manifest):
    manifest["pieces"]["model"]["none"]["shape"] = [0, 2**62, 2**62]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_box, r"model\.vector must have parts with all its 7 numbers, got 5"),
        (a_box_twice, r"model\.vector must have parts that do not overlap"),
        (a_box_of_another_rank, r"model\.vector must have a box of row 2 and .*, got Box"),
        (boxes_in_another_order, r"model\.qkv must have a box of row 0 and as wide as"),
        (a_tensor_that_no_rank_has, r"model\.rows2 must be torch.float32 on rank 0, got none"),
        (a_tensor_less, r"model.1of4.safetensors: expected no tensor that state.json .* rows$"),
        (a_tensor_less_that_only_the_first_has, r"model.0of4.safetensors: expected .* got count$"),
        (another_dtype, r"model\.vector must be torch.float64 on rank 0, got torch.int64"),
        (a_larger_whole, r"model\.rows must have parts with all its \d+ numbers, got 30"),
        (a_whole_of_no_size, r"step-00000002: .*overflow"),
        (lambda m: m["files"].pop("ema.3of4.safetensors"), "no file that state.json does not list"),
        *(
            (lambda m, k=key, v=value: m.update({k: v}), f"expected {key} as `save` writes it")
            for key, value in [
                ("ranks", 1), ("ranks", "4"), ("ranks", True), ("pieces", []),
                ("pieces", {"other": {}}), ("pieces", {"model": []}),
                ("pieces", {"model": {"w": {"dtype": "F32", "shape": [1]}}}),
                ("pieces", {"model": {"w": {"dtype": "F3", "shape": [0], "boxes": []}}}),
                ("pieces", {"model": {"w": {"dtype": "F32", "shape": [-1], "boxes": []}}}),
                *(
                    ("pieces", {"model": {"w": {"dtype": "F32", "shape": [4], "boxes": [box]}}})
                    for box in [
                        [0, 0, [0]], [4, 0, [0], [4]], [0, -1, [0], [4]], [0, 0, [1], [4]],
                        [0, 0, [0, 0], [4, 1]], [0, 0, 0, [4]], [0, 0, [0.0], [4]], 3,
                    ]
                ),
            ]
        ),
    ],
)  # fmt: skip
def test_load_refuses_pieces_that_make_no_whole(sharded, change, message):
    rewritten(sharded, change)
    with pytest.raises(ValueError, match=message):
        load(sharded)


def test_a_format_of_one_process_has_no_files_of_several(sharded):
    rewritten(sharded, lambda manifest: manifest.update(format=1))
    with pytest.raises(ValueError, match="expected files as `save` writes it"):
        load(sharded)


# how a save fails


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("no_room_to_write", OSError, "rank 2: cannot write checkpoint .*2: No space left"),
        ("no_room_to_publish", OSError, "rank 0: cannot write checkpoint .*2: No space left"),
        ("no_flush", OSError, "rank 1: cannot write checkpoint .*2: No space left"),
        ("overlap", ValueError, r"model\.w must have parts that do not overlap"),
        ("hole", ValueError, r"model\.w must have parts with all its 4 numbers, got 3"),
        ("other_shape", ValueError, r"model\.w must be \(\(4,\), 'F32'\) on each rank, got \(\(5"),
        ("other_dtype", ValueError, r"model\.w must be .* on each rank, got \(\(4,\), 'F16'\)"),
        ("not_a_tensor", ValueError, r"rank 1: model\.w must be a tensor, got list"),
        ("not_finite", FloatingPointError, "rank 3: weights must be finite to be saved"),
        ("other_steps", ValueError, r"step must be the same on each rank, got \[2, 2, 2, 3\]"),
        ("whole_elsewhere", ValueError, r"model\.w must be whole on rank 0 as on rank 1"),
        ("whole_and_parts", ValueError, r"model\.w must be whole on each rank or on none"),
        ("interrupted", RuntimeError, "rank 1: KeyboardInterrupt|as it was asked"),
        ("copy_fails_in_the_background", ValueError, "rank 1: a file was cut short"),
        ("dies", RuntimeError, r"rank 2 has left the job: .*(closed|reset) by peer"),
    ],
)
def test_what_fails_in_one_process_is_raised_in_all_and_nothing_is_left(
    folder, outcomes, case, kind, message
):
    told = [outcome for outcome, _ in outcomes[case]]
    assert len(told) == WORLD - (case == "dies")
    assert {name for name, *_ in told} == {kind.__name__}
    assert len({text for _, text, _ in told}) == 1 + (case == "interrupted")
    for _, text, number in told:
        with pytest.raises(kind, match=message):
            raise kind(text)
        assert number == (errno.ENOSPC if kind is OSError else None)


@pytest.mark.parametrize("case", CASES)
def test_the_root_has_what_was_published_and_all_of_it_is_whole(folder, outcomes, case):
    root = folder / case
    assert names(root) == STEPS[case]
    for path in root.iterdir():
        load(path)
    if case not in ("saves_all", "dies"):
        assert all(listed == STEPS[case] for _, listed in outcomes[case])


def test_threads_save_the_bits_of_the_call_beside_collectives_of_the_steps(folder, outcomes):
    assert [outcome for outcome, _ in outcomes["in_the_background"]] == [["done", 1.5]] * WORLD
    for step in (2, 3):
        tensors, state = load(folder / "in_the_background" / f"step-{step:08d}")
        assert bits(tensors)["model", "rows"] == bits({"model": WHOLE})["model", "rows"]
        assert state == {"step": step}


def test_an_error_of_the_threads_is_raised_by_the_next_save_of_all(outcomes):
    (told,) = {json.dumps(outcome) for outcome, _ in outcomes["fails_in_the_background"]}
    kind, ((step, text),) = json.loads(told)
    assert (kind, step) == ("done", 3)
    assert text == "rank 0: model.w must have parts that do not overlap, got some that do"


# one process


def test_one_process_saves_parts_that_it_has_all_of_as_a_whole(tmp_path):
    w = torch.arange(12.0).view(4, 3)
    one = Shard(w, (4, 3), (Box((0, 0), (4, 3), 0),))
    two = Shard(w, (4, 3), (Box((2, 0), (2, 3), 0), Box((0, 0), (2, 3), 2)))
    path = save(tmp_path / "parts", 1, {"model": {"one": one, "two": two}}, {})
    wholes = {"one": w, "two": torch.cat([w[2:], w[:2]])}
    again = save(tmp_path / "whole", 1, {"model": wholes}, {})
    assert names(path) == names(again) == ["model.safetensors", "state.json"]
    assert all((path / n).read_bytes() == (again / n).read_bytes() for n in names(path))
    assert load_latest(tmp_path / "parts")[0] == path


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (((3,), (4,), (Box((0,), (3,), 0),)), "parts with all its 4 numbers, got 3"),
        (((4,), (4,), ()), "parts with all its 4 numbers, got 0"),
        (((4,), (4,), (Box((1,), (4,), 0),)), r"boxes within \(4,\), got Box"),
        (((4,), (4,), (Box((-1,), (4,), 0),)), r"boxes within \(4,\), got Box"),
        (((4,), (4,), (Box((0, 0), (4, 1), 0),)), r"boxes within \(4,\), got Box"),
        (((4,), (4,), (Box((0,), (4,), 1),)), r"a box of row 0 and as wide as \(4,\), got Box"),
        (((4, 2), (4, 3), (Box((0, 0), (4, 3), 0),)), r"a box of row 0 and as wide as \(4, 2\)"),
        (((4,), (4,), (Box((0,), (2,), 0),)), r"boxes of all rows of \(4,\), got 2"),
        (((4, 1), (4,), (Box((0,), (4,), 0),)), r"a local tensor of the dims of \(4,\), got"),
        (((), (), (Box((), (), 0),)), r"a local tensor of the dims of \(\), got"),
    ],
)
def test_save_rejects_boxes_that_are_not_the_rows_of_the_local_tensor(tmp_path, shard, message):
    local, shape, boxes = shard
    tensors = {"model": {"w": Shard(torch.ones(local), shape, boxes)}}
    with pytest.raises(ValueError, match=rf"model\.w must have {message}"):
        save(tmp_path / "root", 1, tensors, {})
    assert not (tmp_path / "root").exists()
