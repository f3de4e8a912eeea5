"""Rows of benchmarks as they might be measured, for the tests of what reads them."""

import json
from pathlib import Path

MIB = 2**20
CPU = {
    "device": "AMD EPYC",
    "driver": None,
    "threads": 2,
    "torch": "2.13.0+cpu",
    "triton": "3.9.0",
    "commit": "abc1234",
    "copy_gbps": 68.9,
    "matmul_tflops": 0.178,
}
GPU = CPU | {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "570.86",
    "threads": 16,
    "torch": "2.13.0+cu130",
    "copy_gbps": 2900.0,
    "matmul_tflops": 690.0,
}
# saved activations and time of a step, of eager's
POLICIES = {
    "none": (0.52, 0.97),
    "attention": (0.47, 0.99),
    "mlp": (0.32, 1.06),
    "qkv": (0.17, 1.12),
    "layer": (0.055, 1.27),
}
WHOLE = {
    "end_to_end": (None, 1.0, 1.0),
    "checkpointed": (None, 0.07, 1.34),
    "selective": (None, 0.45, 1.14),
}
BUDGETS = {1.0: (0.85, 0.91), 0.5: (0.42, 0.99), 0.2: (0.2, 1.16)}


def training_rows(
    about=GPU,
    *,
    family="dit",
    preset="S/2",
    batch=64,
    predicted=False,
    weights=130 * MIB,
    saved=5200 * MIB,
    ms=70.0,
    num_blocks=(1, 2, 3, 4, 6),
):
    """Every way to train one model; bytes and times follow a formula with a little noise."""
    case = {"family": family, "preset": preset, "batch": batch, "dtype": "float32"}
    rest = {"weights": weights, "saved": saved, "ms": ms, "predicted": predicted}
    for method, (budget, kept, time) in WHOLE.items():
        yield _row(case | about, method, 1, None, budget, "none", kept, time, **rest)
    for budget, (kept, time) in BUDGETS.items():
        yield _row(case | about, "compiled", 1, None, budget, "none", kept, time, **rest)
    for count in num_blocks:
        for offload in ("none", "cpu") if count > 1 else ("none",):
            if count > 1:
                yield _row(case | about, "block_stock", count, None, None, offload, 1, 1.06, **rest)
            for recompute, (kept, time) in POLICIES.items():
                yield _row(
                    case | about,
                    "block_fused",
                    count,
                    recompute,
                    None,
                    offload,
                    kept,
                    time,
                    **rest,
                )


def _row(
    about, method, count, recompute, budget, offload, kept, time, *, weights, saved, ms, predicted
):
    noise = 1 + 0.01 * ((int(1000 * kept) + count) % 5)
    time = time * noise * (1.05 if offload == "cpu" else 1) * (1 + 0.01 * (count - 1))
    held = weights / (count if offload == "cpu" else 1)
    parts = {
        "parameters": held,
        "gradients": weights / count,
        "optimizer": 2 * held,
        "inputs": 2 * MIB,
        "saved_activations": saved * kept / count,
        "temporaries": saved / 60,
        "workspaces": 0 if about["driver"] is None else 32 * MIB,
    }
    parts = {name: int(size) for name, size in parts.items()}
    step = ms * time / count
    flops = 3e12
    times = {
        "step_ms": step,
        "p20_ms": 0.98 * step,
        "p80_ms": 1.03 * step,
        "sweep_ms": step * count,
        "samples_per_second": about["batch"] / step * 1e3,
        "rounds": 15,
        "timing": "wall clock" if about["driver"] is None else "cuda graph",
        "achieved_tflops": flops / step / 1e9,
        "share_of_matmul_rate": flops / step / 1e9 / about["matmul_tflops"] % 0.9 + 0.01,
    }
    peak = sum(parts.values())
    ways = {"method": method, "num_blocks": count, "recompute": recompute, "budget": budget}
    ways |= {"optimizer_in_backward": False, "launch": "ops"}
    implementation = "inductor" if method == "compiled" else "torch"
    return (
        {"suite": "training", "offload": offload, "flops": flops}
        | ways
        | (dict.fromkeys(times) if predicted else times)
        | {
            "peak_allocated_bytes": peak,
            "peak_reserved_bytes": None if about["driver"] is None else int(peak * 1.06),
            "saved_bytes": parts["saved_activations"],
            "by_category": parts,
            "memory": "predicted" if predicted else "measured",
            "implementation": "triton" if method == "block_fused" else implementation,
            "command": "python benchmarks/training.py --family dit",
        }
        | about
    )


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


def ops_rows(about=CPU, *, ops=("adaln_norm", "gelu")):
    for op in ops:
        for direction in ("forward", "backward"):
            for number, impl in enumerate(("fused", "eager", "compiled")):
                ms = 0.4 + 0.3 * number + 0.1 * len(direction)
                yield {
                    "impl": impl,
                    "op": op,
                    "direction": direction,
                    "implementation": {"fused": "cpp", "eager": "torch"}.get(impl, "inductor"),
                    "shape": [4, 256, 384],
                    "dtype": "float32",
                    "median_ms": ms,
                    "p20_ms": 0.9 * ms,
                    "p80_ms": 1.1 * ms,
                    "rounds": 11,
                    "timing": "wall clock",
                    "bytes_moved": 3145728,
                    "achieved_gbps": 3145728 / ms / 1e6,
                    "allocated_bytes": 1572864 * number,
                    "resident_bytes": 3145728,
                    "command": "python benchmarks/ops.py",
                } | about


def write(path: Path, rows) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
