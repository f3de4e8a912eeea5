"""Every command that a page or a script names is run, at a small size.

A command of `python -m dbkernels` runs as it is written, with SMALLER behind it; of a flag that is
there twice the last one counts. Any other command takes long, or changes the checkout: ELSEWHERE
has the words of a test or of CI that run it or its pieces, at a small size too.
"""

import ast
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from cli.runs import SIZES
from training.trackers import PACKAGES

from dbkernels.cli import main as cli

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))]
ONE_STEP = "--preset digits --batch 8 --num-blocks 1 --methods block_fused --recompute none"
SMALLER = {
    "train": [*SIZES, "--depth", "4"],
    "merge": [],
    "evaluate": ["--device", "cpu"],
    "sample": ["--device", "cpu", "--per-class", "1", "--levels", "2"],
    "profile": [*ONE_STEP.split(), "--offload", "none", "--steps", "1", "--device", "cpu"],
    "plan": ["--preset", "digits", "--batch", "8"],
    "doctor": [],
    "tokenize": ["--processes", "1"],
}
STARTS = ["--starts", "2"]  # behind a command that says how many
RUNNERS = [".ci/run", *(f"tools/{name}.sh" for name in ("test", "gpu", "setup"))]
ELSEWHERE = {
    "bash tools/test.sh": "exec bash tools/test.sh",  # it is what CI runs
    "bash tools/test.sh tests/training -k resume": '-m pytest "$@"',
    "bash tools/demo.sh": '"demo.sh"',
    # torchrun is torch.distributed.run, which tests start
    "torchrun --nproc-per-node 8 -m dbkernels train dit --preset XL/2 --data latents.npy --out "
    "runs/xl --num-blocks 4 --sharing copies --block 0 --shard": "torch.distributed.run",
    "torchrun --nproc-per-node 6 -m dbkernels train vit --out runs/six --num-blocks 3 --sharing "
    "copies": "torch.distributed.run",
    "pip install torch": "\"$torch\" 'setuptools>=77' ninja",
    "pip install .": '"bdist_wheel", "--dist-dir"',
    # it installs torch for each Python; tests make the same archive and wheel of two functions
    "bash tools/release.sh": '"bdist_wheel", "--dist-dir"',
    "bash tools/release.sh [PYTHON ...]": '"sdist", "--formats=tar"',
    "bash tools/gpu.sh": "bash tools/gpu.sh --rehearse",
    "bash tools/gpu.sh [--rehearse] [smoke|headline|kernels|rest ...]": '"--rehearse", "kernels"',
    "bash tools/gpu_wheels.sh": '"gpu_wheels.sh"',  # it downloads; a test reads what it asks for
    "bash tools/other_triton.sh VERSION [options of kernel_report.py]": "other_triton.sh 3.6.0",
    "python tools/kernel_report.py": "python tools/kernel_report.py",
    "python tools/report.py benchmarks/results --tables benchmarks/RESULTS.md": '"--tables", str(',
    "mkdocs build --strict": '"mkdocs", "build", "--strict"',
    "python tools/pictures.py": '"pictures.py"',
    "python tools/count.py": "count.py",
    "python tools/shakespeare.py --out DIR": '"--out", str(out)',
    "python tools/count.py [--json]": '"--json"',
    "python tests/golden/record.py": "recording.digests(",  # it would write what tests compare with
    "python setup.py build_ext --inplace": '("build_ext", "--inplace")',
    "python -m pytest --rehearse -m gpu": '"--rehearse", "-m", "gpu"',
    "python benchmarks/layer.py --launches --B 64 --dim 1152 --num-heads 16 --dtype autocast": (
        "launches=True"
    ),
    "python benchmarks/study.py NAME [--seeds 3] [--scale tiny|small|paper]": 'bench("study")',
    "python benchmarks/judge.py PLACE [--images 500]": 'bench("judge").main',
    "python benchmarks/isometry.py RUN [RUN ...]": "OfRuns(",
    "python examples/adopt.py --layer dit --recompute none": 'run("adopt.py"',
    "python examples/finetune_dit.py --weights DiT-XL-2-256x256.pt --data latents.npy": (
        'run("finetune_dit.py"'
    ),
    "python examples/flow.py --steps 500 --out digits.png": 'run("flow.py"',
    "python examples/lora_blocks.py --steps 200 --out adapters": 'run("lora_blocks.py"',
    "python examples/own_dataset.py --workers 2": 'run("own_dataset.py"',
    "python examples/own_layers.py --layers torch --num-blocks 3": 'run("own_layers.py"',
    "python benchmarks/loading.py --workers 0 1 2": 'rows_of_main("loading"',
    "python benchmarks/checkpoints.py --threads 1": 'run_main("checkpoints"',
    "python benchmarks/composition.py": 'run_main("composition", words)',
    "python benchmarks/composition.py --measure": 'bench("composition_gloo")',
    "python examples/scale.py --gpus 1024 --memory 80GiB": 'run("scale.py"',
    "python examples/small_gpu.py --memory 600MiB --steps 100": 'run("small_gpu.py"',
    "python examples/compare_runs.py --steps 300 --out runs/compared": 'run("compare_runs.py"',
    "python -m pytest examples/test_memory_budget.py": '"test_memory_budget.py"',
    "python benchmarks/run.py --quick": "run.main(asked, [job])",
    "python benchmarks/gpu_jobs.py [--rehearse] [PART ...]": "benchmarks/gpu_jobs.py",
    "python benchmarks/gpu_table.py FOLDER": "benchmarks/gpu_table.py",
    "python benchmarks/show.py FILE.jsonl ...": '"show"',
}
FOLDERS = ("tools", "benchmarks", "examples")
RUN = re.compile(
    rf"(?:python|bash) (?:-m dbkernels|-m pytest|(?:{'|'.join(FOLDERS)}|tests)/|setup\.py)"
)


def commands(text):
    """Commands of the fenced blocks of a page, each on one line and without its comment."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r" +", " ", re.sub(r"\s+#.*", "", line)).strip()
            if command:
                yield command


def said(path):
    """Commands of a script's own words: its docstring, or the comments that it begins with."""
    source = path.read_text()
    if path.suffix == ".py":
        words = ast.get_docstring(ast.parse(source)) or ""
    else:
        words = "\n".join(re.findall(r"^#(?!!) ?(.*)", source, re.MULTILINE))
    quoted = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", words)]
    alone = [line.strip() for line in words.splitlines() if RUN.match(line.strip())]
    return [command.rstrip(":") for command in [*quoted, *alone] if RUN.match(command)]


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    """A directory with what the pages' commands read: latents, text, embeddings, and budgets.

    Packages that show runs are there, in memory.
    """
    for name, make in PACKAGES.items():
        monkeypatch.setitem(sys.modules, name, make([]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # to start other processes takes longer
    for suffix in ("", "_test"):
        np.save(f"latents{suffix}.npy", np.zeros((8, 4, 8, 8), dtype=np.float32))
        np.save(f"latents{suffix}_labels.npy", np.arange(8) % 2)
        for end, shape in {"": (1, 8, 8), "_text": (3, 5), "_pooled": (6,)}.items():
            np.save(f"captions{suffix}{end}.npy", np.ones((8, *shape), dtype=np.float32))
    np.savez("prompts.npz", text=np.ones((1, 3, 5), "f4"), pooled=np.ones((1, 6), "f4"))
    for folder in ("plays", "benchmarks"):
        (tmp_path / folder).mkdir()
    for name in ("one", "two"):
        (tmp_path / "plays" / f"{name}.txt").write_text("To be, or not to be\n\n" * 20)
    cli.main(["profile", *SMALLER["profile"], "--write", "benchmarks/budgets.json"])
    capsys.readouterr()
    return tmp_path


def test_the_commands_of_the_pages_run_one_after_another(place, capsys):
    pages = {page: list(commands((ROOT / page).read_text())) for page in PAGES}
    assert len(pages["README.md"]) > 5 and len(pages["docs/command_line.md"]) > 5
    for command in dict.fromkeys(command for found in pages.values() for command in found):
        words = shlex.split(command)
        if words[:3] == ["python", "-m", "dbkernels"]:
            smaller = SMALLER[words[3]] + (STARTS if "--starts" in words else [])
            as_written = {"--check", "--quality"} & set(words)  # they name what decides the sizes
            cli.main(words[3:] + ([] if as_written else smaller))
            assert capsys.readouterr().out, command
        else:
            assert command in ELSEWHERE, f"a page names a command that no test runs: {command}"


def test_the_commands_that_scripts_name_are_run_somewhere():
    scripts = [path for folder in FOLDERS for path in (ROOT / folder).iterdir()]
    named = {command for path in scripts if path.suffix in (".py", ".sh") for command in said(path)}
    assert "python tools/report.py benchmarks/results --tables benchmarks/RESULTS.md" in named
    assert "bash tools/other_triton.sh VERSION [options of kernel_report.py]" in named
    assert named <= set(ELSEWHERE)


def test_what_runs_elsewhere_is_there():
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    texts = [path.read_text() for path in [*tests, *(ROOT / name for name in RUNNERS)]]
    for command, words in ELSEWHERE.items():
        assert any(words in text for text in texts), f"nothing runs {command}"
