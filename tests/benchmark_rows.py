"""Rows of benchmarks as they might be measured, for the tests of what reads them."""

import json
import math
from itertools import pairwise
from pathlib import Path

MIB = 2**20
CPU = {"device": "AMD EPYC", "driver": None, "threads": 2, "torch": "2.13.0+cpu", "triton": "3.9.0"}
CPU |= {"commit": "abc1234", "copy_gbps": 68.9, "matmul_tflops": 0.178}
GPU = CPU | {"device": "NVIDIA H100 80GB HBM3", "driver": "570.86", "copy_gbps": 2900.0}
POLICIES = ("none", "attention", "mlp", "qkv", "layer")
TIMES = ("step_ms", "p20_ms", "p80_ms", "sweep_ms", "samples_per_second", "share_of_matmul_rate")


def training_rows(about=GPU, *, preset="S/2", predicted=False, num_blocks=(1, 2, 3, 4, 6)):
    """Every way to train one model, each with a smaller peak and a longer sweep than the last."""
    ways = [(name, 1, None, None, "none") for name in ("end_to_end", "checkpointed", "selective")]
    ways += [("compiled", 1, None, budget, "none") for budget in (1.0, 0.5, 0.2)]
    for count in num_blocks:
        for offload in ("none", "cpu") if count > 1 else ("none",):
            ways += [("block_stock", count, None, None, offload)] * (count > 1)
            ways += [("block_fused", count, policy, None, offload) for policy in POLICIES]
    names = ("method", "num_blocks", "recompute", "budget", "offload")
    for number, way in enumerate(ways):
        peak, step = (6000 - 50 * number) * MIB, (70.0 + number) / way[1]
        times = (step, 0.98 * step, 1.03 * step, step * way[1], 64e3 / step, 0.5)
        measured = {"rounds": 15, "timing": "wall clock"} | dict(zip(TIMES, times, strict=True))
        fused = "triton" if way[0] == "block_fused" else "torch"
        yield {
            "suite": "training", "family": "dit", "preset": preset, "batch": 64,
            "dtype": "float32", **dict(zip(names, way, strict=True)),
            "optimizer_in_backward": False, "launch": "ops", "peak_allocated_bytes": peak,
            "peak_reserved_bytes": peak, "saved_bytes": peak // 2,
            "memory": "predicted" if predicted else "measured",
            "implementation": "inductor" if way[0] == "compiled" else fused,
            "command": "python benchmarks/training.py --family dit",
            **(dict.fromkeys(measured) if predicted else measured), **about,
        }  # fmt: skip


def demo_rows(about=CPU):
    """A ViT and a DiT, end to end and in three blocks."""
    for family in ("vit", "dit"):
        for count in (1, 3):
            row = {"suite": "demo", "preset": "digits", "family": family, "num_blocks": count}
            row |= {"updates": 500, "loss": [[2.0, 1.0, 0.5 + block] for block in range(count)]}
            row |= {"peak_bytes": 60 * MIB // count, "saved_bytes": 30 * MIB // count}
            row |= {"step_ms": 90.0 / count, "sweep_ms": 90.0, "command": "bash tools/demo.sh"}
            shares = [0.978, 0.975, 0.98 - 0.01 * count]
            vit = {"accuracy": shares, "final_accuracy": shares[-1], "cross_entropy": 0.11}
            yield row | (vit if family == "vit" else {"frechet": 20.0 + count}) | about


def text_demo_rows(about=CPU):
    """A masked and an autoregressive model, end to end and in three blocks."""
    ends = [8.0, 1.05, 0.45, 0.05]
    for family in ("mdm", "ar"):
        for count in (1, 3):
            row = {"suite": "demo", "preset": "shakespeare", "family": family, "num_blocks": count}
            row |= {"updates": 600, "loss": [[3.0, 2.5, 2.3 + block] for block in range(count)]}
            row |= {"peak_bytes": 12 * MIB // count, "saved_bytes": 9 * MIB // count}
            row |= {"step_ms": 60.0 / count, "sweep_ms": 60.0, "training_s": 36.0}
            row |= {"text": f"the {family} {count}", "held_out": "let us sit upon the ground"}
            row |= {"bits": 2.5 + 0.1 * count, "blocks": [2.6], "windows": 128, "curves": []}
            row |= {
                "shares": [[1.0, 0.0]] if family == "mdm" else [],
                "command": "bash tools/demo.sh",
            }
            if count == 3:
                row["blocks"] = [1.5, 0.9, 0.4]
            if (family, count) == ("mdm", 3):
                row["shares"] = [[1.0, 0.66], [0.66, 0.33], [0.33, 0.0]]
            if (family, count) == ("ar", 3):
                row["curves"] = [_curve(high, low) for high, low in pairwise(ends)]
            yield row | about


def _curve(high, low):
    """What a block might measure at five levels."""
    levels = [high * (low / high) ** (k / 4) for k in range(5)]
    errors = [s**2 * math.exp(-((math.log(s) + 0.55) ** 2) / 1.2) for s in levels]
    entropy = [2.3 / (1 + (0.35 / s) ** 2) for s in levels]
    return {"levels": levels, "errors": errors, "cross_entropy": entropy}


def ops_rows(about=CPU, *, ops=("adaln_norm", "gelu")):
    """Each op forward and backward; the later implementations are slower."""
    moved = {"bytes_moved": 3 * MIB, "shape": [4, 256, 384], "dtype": "float32"}
    moved |= {"rounds": 11, "timing": "wall clock", "command": "python benchmarks/ops.py"}
    impls = {"fused": "cpp", "eager": "torch", "compiled": "inductor"}
    for op in ops:
        for direction in ("forward", "backward"):
            for number, (impl, runs) in enumerate(impls.items()):
                ms = 0.4 + 0.3 * number + 0.1 * len(direction)
                row = {"impl": impl, "op": op, "direction": direction, "implementation": runs}
                row |= {"median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms}
                row |= {"achieved_gbps": 3 * MIB / ms / 1e6, "allocated_bytes": MIB * number}
                yield row | moved | about


STUDY = {
    "suite": "study", "study": "families", "scale": "tiny", "data": "digits", "family": "vit",
    "batch": 32, "updates": 1200, "num_blocks": 1, "layers": [12], "train": "dbkernels train vit",
    "config": {}, "command": "python benchmarks/study.py families --scale tiny",
}  # fmt: skip
WHOLE, SHALLOW = "end to end", "end to end, as deep as a block"


def of_study(arm, values, name="accuracy", **changes):
    """A row of each seed of a study's arm; a figure is a number or a list."""
    about = STUDY | CPU | {"arm": arm} | changes
    return [about | {"seed": seed, name: value} for seed, value in enumerate(values)]


def write(path: Path, rows) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
