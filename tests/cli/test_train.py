import json
import shutil

import numpy as np
import pytest
import torch
from cli.runs import refused, write_npz

from dbkernels.training.diffusion_blocks import DiffusionBlocks


def read_tree(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def weights_of(directory, step):
    return (directory / f"checkpoints/step-{step:08d}/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-blocks 4", "num_blocks must be between 1 and the 3 layers, got 4"),
        ("--num-blocks 0", "num_blocks must be between 1 and the 3 layers, got 0"),
        ("--sigma-min 80", "got sigma_min 80.0 and sigma_max 80.0"),
        ("--sigma-min 90", "0 < sigma_min < sigma_max, got sigma_min 90.0"),
        ("--sigma-max nan", "got sigma_min 0.002 and sigma_max nan"),
        ("--std 0", "std positive, got mean -1.2 and std 0.0"),
        ("--gamma -1", "gamma must be finite and at least 0, got -1.0"),
        ("--split 1,1", "add up to 3 layers, got [1, 1] with sum 2"),
        ("--split a,b,c", "split must be whole numbers with commas between, got a,b,c"),
        ("--layers 0,1,3", "layers must be 0 to 2, got [0, 1, 3]"),
        ("--layers 0;1", "layers must be whole numbers with commas between, got 0;1"),
        ("--data nope", "data source nope does not exist"),
        ("--data=", "data must be digits or a path, got an empty text"),
        ("--data empty", "empty has no data"),
        ("--data empty.npz", "empty.npz is not a whole .npz file"),
        ("--data negative.npz", "labels must not be negative, got -1"),
        ("--data odd.npz", "the patch must divide the image size, got 2 and 7"),
        ("--data wide.npz", "images must be square, got 8 x 6"),
        ("--patch 3", "the patch must divide the image size, got 3 and 8"),
        ("--preset huge", "preset of ViT must be one of cifar100, digits, got huge"),
        ("--num-heads 3", "dim must be a multiple of num_heads, got 16 and 3"),
        ("--num-heads -1", "num_heads must be positive, or 0 for the preset's, got -1"),
        ("--label-drop 0.1", "label_drop must be 0 for vit, got 0.1"),
        ("--shift -1", "shift must be at least 0 pixels, got -1"),
        ("--save-every -1", "save_every must be at least 0, got -1"),
        ("--lr 0", "lr must be positive, got 0.0"),
        ("--lr inf", "lr must be finite, got inf"),
        ("--clip inf", "clip must be finite, got inf"),
        ("--weight-decay inf", "weight_decay must be finite, got inf"),
        ("--steps 0", "steps must be at least 1, got 0"),
        ("--seed -1", "seed must be at least 0, got -1"),
        (f"--seed {2**63}", f"seed must be below 2**63, got {2**63}"),
        ("--accumulate 3", "accumulate must divide the batch size 8, got 3"),
        ("--steps-per-swap -1", "steps_per_swap must be at least 0, got -1"),
        ("--prefetch", "offload must be cpu or disk for prefetch, got none"),
        ("--offload-dir off", "offload_dir must name a directory for offload disk alone, got off"),
        ("--offload disk", "offload_dir must name a directory for offload disk alone, got none"),
        ("--resume latest", "out must hold a checkpoint, got none"),
        ("--resume nope", "nope is not a checkpoint"),
        ("--device tpu", "device must be auto, cpu or cuda, got tpu"),
    ],
)
def test_a_mistake_is_one_sentence_and_touches_no_file(trained, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.npz").touch()
    write_npz(tmp_path / "negative.npz", labels=np.full(24, -1))
    write_npz(tmp_path / "odd.npz", (1, 7, 7))
    write_npz(tmp_path / "wide.npz", (1, 8, 6))
    before = read_tree(tmp_path)
    assert refused(trained("vit", "out", *flags.split()), message)
    assert not (tmp_path / "out").exists()
    assert read_tree(tmp_path) == before


def test_labels_beyond_the_classes_are_refused(cli, trained, tmp_path):
    trained("vit", "out")
    write_npz(tmp_path / "data.npz", labels=np.arange(24) % 5)
    assert refused(cli("evaluate", "out", "--device", "cpu"), "labels must be in [0, 3), got 4")


def test_refuses_a_file_in_the_place_of_the_directory(trained, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert refused(trained("vit", "out"), "out must be a directory, got the file out")
    assert refused(trained("vit", "out/run"), "error: Not a directory: out/run")
    assert (tmp_path / "out").read_text() == "mine"


def test_refuses_a_directory_that_holds_a_run(trained, tmp_path):
    trained("vit", "out")
    before = read_tree(tmp_path)
    assert refused(trained("vit", "out", "--seed", "1"), "out must hold no run yet")
    assert read_tree(tmp_path) == before


def test_says_what_it_trained(trained, tmp_path):
    outcome = trained("vit", "out")
    assert (outcome.code, outcome.out) == (0, "trained 6 steps in 3 blocks: out\n")
    assert "100%" in outcome.err
    assert outcome.err.count("training") == 1
    assert trained("vit", "one", "--num-blocks", "1").out == "trained 2 steps in 1 block: one\n"
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))


def test_flags_reach_the_configuration(trained, tmp_path):
    flags = "--split 2,1 --num-blocks 2 --gamma 0.2 --sigma-max 40 --lr 0.01 --seed 7 --ema 0.5"
    trained("dit", "out", *flags.split(), "--label-drop", "0.1", "--mirror", "--patch", "4")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["partition"]["split"] == "2,1" and config["partition"]["gamma"] == 0.2
    assert config["prior"]["sigma_max"] == 40.0 and config["prior"]["sigma_min"] == 0.002
    trainer = {"steps": 2, "batch_size": 8, "lr": 0.01, "seed": 7, "ema": 0.5}
    assert trainer.items() <= config["trainer"].items()
    sizes = {"patch": 4, "dim": 16, "depth": 3, "num_heads": 2, "image_size": 8, "num_classes": 3}
    assert sizes.items() <= config["model"].items()
    assert (config["label_drop"], config["mirror"]) == (0.1, True)


@pytest.mark.parametrize("family, automatic", [("vit", "none"), ("dit", "edm")])
def test_the_weighting_follows_the_family_unless_it_is_given(trained, tmp_path, family, automatic):
    trained(family, "auto")
    trained(family, "given", "--weighting", "normalised")
    for out, expected in (("auto", automatic), ("given", "normalised")):
        assert json.loads((tmp_path / out / "config.json").read_text())["weighting"] == expected


def test_resuming_a_finished_run_changes_nothing_and_says_so(trained, tmp_path):
    trained("vit", "out")
    before = read_tree(tmp_path)
    outcome = trained("vit", "out", "--resume", "latest")
    assert outcome.code == 0
    assert outcome.out == "nothing to do: all 6 steps are trained already: out\n"
    assert read_tree(tmp_path) == before


def test_resume_names_the_settings_that_differ(trained, tmp_path):
    trained("vit", "out")
    before = read_tree(tmp_path)
    outcome = trained("vit", "out", "--resume", "latest", "--lr", "0.5", "--gamma", "0.1")
    assert refused(outcome, "2 settings differ from checkpoint out/checkpoints/step-00000006")
    assert "trainer.lr: saved 0.001, current 0.5" in outcome.err
    assert "partition.gamma: saved 0.05, current 0.1" in outcome.err
    assert read_tree(tmp_path) == before


def truncate(data):
    return data[: len(data) // 2]


def flip_bit(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("damage", [truncate, flip_bit])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_resumes(
    trained, tmp_path, damage, file
):
    trained("vit", "whole", "--save-every", "2")
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    path = tmp_path / "out/checkpoints/step-00000006" / file
    path.write_bytes(damage(path.read_bytes()))
    outcome = trained("vit", "out", "--save-every", "2", "--resume", "latest")
    assert refused(outcome, "the previous checkpoint step-00000004 is intact")
    previous = "out/checkpoints/step-00000004"
    outcome = trained("vit", "out", "--save-every", "2", "--resume", previous)
    assert (outcome.code, outcome.out) == (0, "trained 2 steps in 3 blocks: out\n")
    assert weights_of(tmp_path / "out", 6) == weights_of(tmp_path / "whole", 6)
    assert (tmp_path / "out/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    trained, cli, tmp_path, monkeypatch
):
    inner, calls = DiffusionBlocks.loss, []

    def overflowing(*arguments):
        calls.append(arguments)
        return inner(*arguments) * (torch.inf if len(calls) == 4 else 1)

    monkeypatch.setattr(DiffusionBlocks, "loss", overflowing)
    outcome = trained("vit", "out", "--save-every", "3", "--order", "sequential")
    message = outcome.err.splitlines()[-1]
    assert outcome.code == 1
    assert message.startswith("error: the loss must be finite, got loss inf")
    assert "in block 1 at its step 1 with sigma in [" in message
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000003"]
    assert cli("evaluate", "out", "--device", "cpu").code == 0


def test_a_run_with_offload_is_the_same_run(trained, tmp_path):
    trained("dit", "all", "--steps-per-swap", "2", "--ema", "0.9")
    offload = ["--offload", "disk", "--prefetch", "--offload-dir", "off"]
    outcome = trained("dit", "swapped", "--steps-per-swap", "2", "--ema", "0.9", *offload)
    assert outcome.out == "trained 6 steps in 3 blocks: swapped\n"
    assert weights_of(tmp_path / "all", 6) == weights_of(tmp_path / "swapped", 6)
    assert (tmp_path / "all/log.jsonl").read_text() == (tmp_path / "swapped/log.jsonl").read_text()
    assert list((tmp_path / "off").iterdir()) == []


def test_a_disk_too_small_for_the_blocks_is_one_sentence(trained, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9000))
    flags = "--offload disk --offload-dir off"
    assert refused(trained("vit", "out", *flags.split()), "free for the blocks, got 8.79 KiB in")
    assert not (tmp_path / "out").exists()


def short_of_memory(monkeypatch, fits):
    """Have room for so many samples."""
    inner = DiffusionBlocks.loss

    def loss(blocks, block, batch, draw):
        if len(batch["label"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(blocks, block, batch, draw)

    monkeypatch.setattr(DiffusionBlocks, "loss", loss)


def test_out_of_memory_is_one_line_beside_the_bar(trained, monkeypatch):
    short_of_memory(monkeypatch, fits=4)
    outcome = trained("vit", "out")
    assert outcome.code == 0
    lines = [line for line in outcome.err.splitlines() if "out of memory" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: out of memory in block ")
    assert lines[0].endswith("in micro-batches of 8: they have 4 from now on")


def test_out_of_memory_twice_stops_with_the_sizes(trained, monkeypatch):
    short_of_memory(monkeypatch, fits=3)
    outcome = trained("vit", "out")
    assert outcome.code == 1
    message = "with batch 8 in micro-batches of 4, halved in this step already"
    assert outcome.err.splitlines()[-1].startswith("error: out of memory in block ")
    assert outcome.err.splitlines()[-1].endswith(message)


def test_a_rate_that_is_too_high_stops_the_run(trained):
    outcome = trained("vit", "out", "--lr", "1e30")
    assert outcome.code == 1
    assert "error: the loss must be finite" in outcome.err
