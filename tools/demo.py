"""The main job: the same networks end to end and in 3 blocks, side by side, on real digits."""

import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import tyro
from demo_report import write_report
from digit_features import accuracy, all_images, features_of, train_classifier
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from dbkernels.data.images import open_data
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.memory.measure import MEASURED
from dbkernels.models import FAMILIES
from dbkernels.ops import Draw
from dbkernels.training.evaluation import frechet_distance
from dbkernels.training.log import read_log
from dbkernels.training.performance import profile_trainer
from dbkernels.training.run import PartitionConfig, RunConfig, load_run, train
from dbkernels.training.trainer import TrainerConfig

NUM_BLOCKS = (1, 3)
LEVELS = {"vit": 3, "dit": 30}  # of the samplers
GUIDANCE = 1.5
# ten labels of unit length can be read off z below sigma = 0.3, where the published prior has half
# of its mass; about it, a block must look at the image
LABEL_PRIOR = LogNormal(mean=0.0)
# end to end, the ViT sees the noisiest levels alone, where nothing of the label is left in z: it is
# the ordinary classifier, a harder opponent than one network for all levels
CLASSIFIER_PRIOR = LogNormal(mean=0.0, sigma_min=79.0)
PRIORS = {
    ("vit", 1): CLASSIFIER_PRIOR,
    ("vit", 3): LABEL_PRIOR,
    ("dit", 1): LogNormal(),
    ("dit", 3): LogNormal(),
}
SHOWN_PER_CLASS = 10
TIMED_STEPS = 8


@dataclass(frozen=True)
class Demo:
    """Train a ViT and a DiT on digits, end to end and in 3 blocks, and compare them."""

    out: Path = Path("runs/demo")
    """A folder of its own is made in here: the runs, demo.json and report.html."""
    classifier: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(
            steps=500, batch_size=128, lr=2e-3, warmup=20, decay="cosine"
        )
    )
    generator: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(
            steps=1000, batch_size=64, lr=2e-3, warmup=20, decay="cosine", ema=0.99
        )
    )
    per_class: int = 100
    """Generated digits of each class that the Fréchet distance is measured on."""

    def run(self) -> None:
        begin = time.time()
        folder = self.out / time.strftime("%Y%m%d-%H%M%S")
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
            results = {
                "device": f"CPU, {torch.get_num_threads()} threads",
                "torch": torch.__version__,
                "commit": _commit(),
                "command": "bash tools/demo.sh",
                "classification": [self._classify(n, folder, progress) for n in NUM_BLOCKS],
                **self._generation(folder, progress),
            }
        results["seconds"] = time.time() - begin
        _write_json(results, folder / "demo.json")
        write_report(results, folder / "report.html")
        Console().print(_table(results))
        print(f"report: {folder / 'report.html'}  ({results['seconds']:.0f} s in all)")

    def _config(self, family: str, num_blocks: int) -> RunConfig:
        return RunConfig(
            family=family,
            model=FAMILIES[family].model.preset("digits"),
            data="digits",
            weighting=FAMILIES[family].weighting,
            label_drop={"vit": 0.0, "dit": 0.1}[family],
            mirror=False,
            shift=0,
            partition=PartitionConfig(num_blocks=num_blocks),
            prior=PRIORS[family, num_blocks],
            trainer={"vit": self.classifier, "dit": self.generator}[family],
        )

    def _train(self, family: str, num_blocks: int, folder: Path, progress: Progress) -> dict:
        """Train one run and tell what every run tells."""
        config, run = self._config(family, num_blocks), folder / f"{family}-{num_blocks}"
        name = "end to end" if num_blocks == 1 else f"{num_blocks} blocks"
        total = config.trainer.steps * num_blocks
        task = progress.add_task(f"{family}, {name}", total=total)
        train(config, run, device="cpu", on_step=lambda row: progress.advance(task))
        measured = profile_trainer(
            config.trainer_on("cpu", open_data(config.data)), steps=min(TIMED_STEPS, total)
        )
        blocks = config.build("cpu")
        return {
            **measured,
            "name": name,
            "num_blocks": num_blocks,
            "run": str(run),
            "updates_per_layer": config.trainer.steps,
            "prior": [config.prior.mean, config.prior.std],
            "loss": [[r["step"], r["block"], r["loss"]] for r in read_log(run / "log.jsonl")],
            "blocks": [
                {
                    "index": block.index,
                    "layers": block.layers,
                    "low": block.noise.low,
                    "high": block.noise.high,
                    "trained_low": block.trained_noise.low,
                    "trained_high": block.trained_noise.high,
                }
                for block in blocks
            ],
        }

    def _classify(self, num_blocks: int, folder: Path, progress: Progress) -> dict:
        result = self._train("vit", num_blocks, folder, progress)
        _, blocks = load_run(Path(result["run"]), device="cpu")
        evaluated = blocks.evaluate(open_data("digits", "test"), levels=LEVELS["vit"])
        return {
            **result,
            "levels": evaluated.levels,
            "accuracy": evaluated.metrics["accuracy"],
            "ce_at_sigma_max": evaluated.loss_at_most_noise,
            "ce_by_block": evaluated.block_losses,
        }

    def _generation(self, folder: Path, progress: Progress) -> dict:
        images, labels = all_images(open_data("digits", "train"))
        held_out, held_out_labels = all_images(open_data("digits", "test"))
        judge = train_classifier(open_data("digits", "train"), seed=0)
        features = partial(features_of, judge)
        runs = []
        for num_blocks in NUM_BLOCKS:
            result = self._train("dit", num_blocks, folder, progress)
            config, blocks = load_run(Path(result["run"]), device="cpu")
            asked = torch.arange(10).repeat_interleave(self.per_class)
            levels = config.prior.grid(LEVELS["dit"])
            made = blocks.sample({"label": asked}, levels, Draw(0, step=0), guidance=GUIDANCE)
            shown = torch.arange(len(asked)).view(10, -1)[:, :SHOWN_PER_CLASS].flatten()
            runs.append(
                {
                    **result,
                    "frechet": frechet_distance(features(made), features(images)),
                    "recognised": accuracy(judge, made, asked),
                    "images": _pixels(made[shown]),
                    "image_labels": asked[shown].tolist(),
                }
            )
        order = torch.cat([(labels == k).nonzero()[:SHOWN_PER_CLASS, 0] for k in range(10)])
        return {
            "generation": runs,
            "real_images": _pixels(images[order]),
            "real_frechet": frechet_distance(features(held_out), features(images)),
            "judge_accuracy": accuracy(judge, held_out, held_out_labels),
        }


def _pixels(images: Tensor) -> list:
    """Images in [-1, 1], (N, 1, H, W), as nested lists of 0 to 255."""
    return ((images[:, 0] + 1) * 127.5).round().clamp(0, 255).int().tolist()


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def _write_json(results: dict, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(results) + "\n")
    os.replace(temporary, path)


def _table(results: dict) -> Table:
    """Every run a column, every figure a row."""
    runs = [*results["classification"], *results["generation"]]
    baselines = {id(run): group[0] for group in (runs[:2], runs[2:]) for run in group}
    table = Table(title="digits, held-out test split; the same updates for every layer")
    table.add_column("")
    for kind, run in zip(["ViT", "ViT", "DiT", "DiT"], runs, strict=True):
        table.add_column(f"{kind}\n{run['name']}", justify="right")

    def row(name, text):
        table.add_row(name, *(text(run) for run in runs))

    row("accuracy, last step", lambda r: f"{r['accuracy'][-1]:.2%}" if "accuracy" in r else "")
    row("accuracy, first step", lambda r: f"{r['accuracy'][0]:.2%}" if "accuracy" in r else "")
    row(
        "cross-entropy at sigma_max",
        lambda r: f"{r['ce_at_sigma_max']:.3f}" if "ce_at_sigma_max" in r else "",
    )
    row("Fréchet distance *", lambda r: f"{r['frechet']:.3f}" if "frechet" in r else "")
    row("recognised as asked *", lambda r: f"{r['recognised']:.1%}" if "recognised" in r else "")
    row("peak, MiB", lambda r: f"{r['peak_bytes'] / 2**20:.1f}")
    for category in MEASURED:
        name = f"  {category.replace('_', ' ')}, MiB"
        row(name, lambda r, category=category: f"{r['by_category'][category] / 2**20:.1f}")
    row("kept for backward, MiB", lambda r: f"{r['saved_bytes'] / 2**20:.1f}")
    row("  of end to end", lambda r: f"{r['saved_bytes'] / baselines[id(r)]['saved_bytes']:.3f}")
    row("ms per step", lambda r: f"{r['seconds_per_step'] * 1e3:.1f}")
    row("ms per sweep of all blocks", lambda r: f"{r['seconds_per_sweep'] * 1e3:.1f}")
    table.caption = (
        "* in the features of a small classifier trained on the digits "
        f"({results['judge_accuracy']:.1%} accurate); real held-out digits are at "
        f"{results['real_frechet']:.3f}"
    )
    return table


if __name__ == "__main__":
    tyro.cli(Demo).run()
