"""What each verb judges itself, in one sentence and before it writes anything."""

import shutil

import numpy as np
import pytest
import torch
from cli.runs import SIZES, read_tree, refused, write_npz

from dbkernels.settings import MOST

# what stands between the verb and its flags; of a flag that is there twice the last one counts
BEFORE = {
    "train": f"vit --out out --data data.npz {' '.join(SIZES)}",
    "profile": "--batch 2 --steps 1 --device cpu",
    "plan": "--memory 1GiB --family dit",
    "tokenize": "--out out --tokenizer bytes",
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --num-blocks 4", "num_blocks must be between 1 and the 3 layers, got 4"),
        ("train --sigma-max nan", " and sigma_max nan"),
        ("train --layers 0;1", "layers must be whole numbers with commas between, got 0;1"),
        ("train --data nope", "data source nope does not exist"),
        ("train --data=", "data must be digits or a path, got an empty text"),
        ("train --data odd.npz", "the patch must divide the image size, got 2 and 7"),
        ("train --preset huge", "preset of ViT must be one of cifar100, digits, published, tiny-"),
        ("train --num-heads -1", "num_heads must be at least 0, got -1"),
        ("train --clip inf", f"clip must be at most {MOST}, got inf"),
        ("train --batch-size 1000000000", "batch_size must be at most 1048576, got 1000000000"),
        (
            "train --convert grey",
            "convert must be none where data is no folder of images, got gr",
        ),
        ("train --stride 3", "stride must be 0 where data is no text, got 3"),
        ("train --mean 10 --std 0.1", "mean and std must put levels between sigma_min"),
        (
            "train --mean 0 --std 1e-9",
            "std and the range must be large enough for 3 blocks with levels of their own",
        ),
        ("train --process flow", "process is no setting of the model: dim, depth, num_heads"),
        ("train --t-max 0.5", "t_max is no setting of the prior: mean, std, sigma_min, sigma_max"),
        ("train --depth 65537", "depth must be at most 65536, got 65537"),
        ("train --lora -1", "lora must be at least 0, got -1"),
        (
            "train --lora 2 --lora-targets q,to_k",
            "target must be one of q, k, v, qkv, out, fc1",
        ),
        ("train --lora-alpha 2", "lora must be at least 1 where lora_alpha, lora_targets or"),
        ("train --resume latest", "out must hold a checkpoint, got none"),
        ("train --resume nope", "nope is not a checkpoint"),
        ("train --device cuda", "device cuda needs an NVIDIA GPU"),
        ("train --out file", "out must be a directory, got the file file"),
        ("train --out file/run", "error: Not a directory: file/run"),
        ("train --out vit", "vit must hold no run yet"),
        ("sample vit", "sample needs a run that generates, got one of vit"),
        ("sample dit --out x.gif", "out must end in .png or .npy, got x.gif"),
        ("sample dit --out no/x.png", "out must lie in a directory that exists, got no/x.png"),
        ("sample dit --out folder.png", "out must be a file, got the directory folder.png"),
        ("sample dit --per-class 0", "per_class must be at least 1, got 0"),
        ("sample dit --guidance nan", "guidance must be finite, got nan"),
        ("sample dit --guidance 2", "guidance must be 1 for a run that never dropped labels"),
        ("sample dit --device cuda", "device cuda needs an NVIDIA GPU"),
        ("sample nope", "a run's directory must hold config.json, got none in nope"),
        ("evaluate", "run_dirs must name at least one run, got none"),
        ("evaluate vit vit", "run_dirs must name each run once, got vit twice"),
        ("evaluate nope", "a run's directory must hold config.json, got none in nope"),
        ("evaluate vit --data lonely.npz", "--data names other data, --split train takes what was"),
        ("evaluate vit --levels 1", "levels must be at least 2, got 1"),
        ("evaluate vit --checkpoint nope", "nope is not a checkpoint"),
        (
            "evaluate vit --data rgb.npz",
            "must be (1, 8, 8), as the model is made for, got (3, 8, 8)",
        ),
        ("evaluate vit --data more.npz", "labels must be in [0, 3), got 4"),
        ("evaluate vit --device tpu", "device must be auto, cpu or cuda, got tpu"),
        ("evaluate vit --device cuda", "device cuda needs an NVIDIA GPU"),
        ("profile --num-blocks 13", "num_blocks must be between 1 and the 12 layers, got 13"),
        ("profile --num-blocks 1;2", "num_blocks must be whole numbers with commas between"),
        ("profile --batch 0", "error: batch must be at least 1, got 0"),
        ("profile --steps 0", "steps must be at least 1, got 0"),
        ("profile --device tpu", "device must be auto, cpu or cuda, got tpu"),
        ("profile --device cuda --measure", "device cuda needs an NVIDIA GPU"),
        ("profile --budget 1.5", "budget must be from 0 to 1, got 1.5"),
        ("profile --methods fused", "of end_to_end, checkpointed, selective, compiled, block"),
        ("profile --recompute none,all", "of none, attention, mlp, qkv, layer, layer_narrow, got"),
        ("profile --offload some", "offload must be of none, cpu, got some"),
        ("profile --target v100", "target must be one of cpu, a100, h100, h200, b200, got v100"),
        ("profile --target h100 --measure", "target must be auto for measure, got h100"),
        ("profile --timeline t.pickle", "show one step: methods, num_blocks, recompute and"),
        ("profile --check none.json", "No such file or directory: none.json"),
        ("profile --update", "update must come with check and its file, got none"),
        ("plan --memory a", "must be a positive number and one of KiB, MiB, GiB, TiB, such as"),
        ("plan --memory=-24GiB", "such as 24GiB, got -24GiB\n"),
        ("plan --preset huge", "preset of DiT must be one of S/2, B/2, L/2, XL/2, digits, got"),
        ("plan --batch 0", "batch must be at least 1, got 0"),
        ("plan --batch 1048577", "batch must be at most 1048576, got 1048577"),
        ("tokenize", "inputs must name at least one file or folder, got none"),
        ("tokenize none.txt", "file none.txt is missing"),
        (
            "tokenize folder.png",
            "folder.png has no text: expected .txt, .jsonl, .txt.gz, .jsonl.gz",
        ),
        ("tokenize file more.npz", "more.npz must be UTF-8, got invalid start byte at byte"),
        ("tokenize file --test empty.txt", "empty.txt is empty"),
        ("tokenize file --tokenizer words", "must be bytes, text8 or the path of a JSON file, got"),
        (
            "tokenize file --train-bpe 300",
            "one of tokenizer and train_bpe must be given, got bytes",
        ),
        ("tokenize file --out vit", "out must not exist yet, or be an empty directory, got vit"),
        ("plan --target tpu", "target must be one of cpu, a100, h100, h200, b200, got tpu"),
    ],
)
def test_a_mistake_is_one_line_and_touches_no_file(cli, runs, monkeypatch, tmp_path, line, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for family in ("vit", "dit"):
        shutil.copytree(runs(family), tmp_path / family)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty.txt").touch()
    write_npz(tmp_path / "odd.npz", (1, 7, 7))
    write_npz(tmp_path / "rgb.npz", (3, 8, 8))
    write_npz(tmp_path / "more.npz", classes=5)
    np.savez(tmp_path / "lonely.npz", images=np.zeros((3, 1, 8, 8), np.uint8), labels=np.arange(3))
    before = read_tree(tmp_path)
    verb, *flags = line.split()
    assert refused(cli(" ".join([verb, BEFORE.get(verb, ""), *flags])), message)
    assert read_tree(tmp_path) == before
    assert not any(tmp_path.glob("out*"))
