import math

import pytest

from dbkernels.training.trainer_config import TrainerConfig

BLOCK = {"resident": "block"}


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
        ({"resident": "some"}, "resident must be all or block, got some"),
        ({"rest": "tape"}, "rest must be host or disk, got tape"),
        ({"prefetch": True}, "resident must be block for prefetch, got all"),
        ({"rest": "disk", "rest_dir": "x"}, "resident must be block for rest disk, got all"),
        ({"optimizer_in_backward": True}, "clip must be 0 with optimizer_in_backward: .*, got 1.0"),
        (
            {"optimizer_in_backward": True, "clip": 0.0, "accumulate": 2},
            "accumulate must be 1 with optimizer_in_backward, got 2",
        ),
        ({**BLOCK, "rest": "disk"}, "rest_dir must name a directory .* disk alone, got none"),
        ({**BLOCK, "rest_dir": "x"}, "rest_dir must name a directory .* disk alone, got x"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**{"steps": 1, "batch_size": 4, **settings})


def test_one_block_may_be_resident_with_the_others_in_memory_or_on_disk():
    for settings in ({}, {"prefetch": True}, {"rest": "disk", "rest_dir": "x", "prefetch": True}):
        assert TrainerConfig(steps=1, **BLOCK, **settings).steps_per_swap == 1
