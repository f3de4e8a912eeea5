import math

import pytest

from dbkernels.training.trainer_config import TrainerConfig

CPU = {"offload": "cpu"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"accumulate": 3}, "accumulate must divide the batch size 4, got 3"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"clip": -1.0}, "clip must be at least 0, got -1.0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, rf"seed must be below 2\*\*63, got {2**63}"),
        ({"lr": math.inf}, "lr must be finite, got inf"),
        ({"steps_per_swap": -1}, "steps_per_swap must be at least 0, got -1"),
        ({"offload": "some"}, "offload must be none, cpu or disk, got some"),
        ({"prefetch": True}, "offload must be cpu or disk for prefetch, got none"),
        ({"offload_dir": "x"}, "offload_dir must name a directory .* disk alone, got x"),
        ({"optimizer_in_backward": True}, "clip must be 0 with optimizer_in_backward: .*, got 1.0"),
        (
            {"optimizer_in_backward": True, "clip": 0.0, "accumulate": 2},
            "accumulate must be 1 with optimizer_in_backward, got 2",
        ),
        ({"offload": "disk"}, "offload_dir must name a directory .* disk alone, got none"),
        ({**CPU, "offload_dir": "x"}, "offload_dir must name a directory .* disk alone, got x"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**{"steps": 1, "batch_size": 4, **settings})


def test_offload_is_to_host_memory_or_to_disk():
    on_disk = {"offload": "disk", "offload_dir": "x", "prefetch": True}
    for settings in (CPU, {**CPU, "prefetch": True}, on_disk):
        assert TrainerConfig(steps=1, **settings).steps_per_swap == 1
