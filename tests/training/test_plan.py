import pytest

from dbkernels.memory.trace import CATEGORIES
from dbkernels.memory.workspace import TARGETS
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.training.estimate import Estimate, Setting
from dbkernels.training.plan import (
    FREE,
    SPEEDS,
    Speed,
    outside_layers,
    plans_of,
    shares,
    smallest_setting,
)

DEPTH, BATCH = 12, 64
EVEN = {"none": 100, "attention": 105, "mlp": 115, "qkv": 120, "layer": 133, "layer_narrow": 133}
# a policy may compute more than the next one, where neither redoes all of the other's
UNEVEN = {"none": 100, "attention": 130, "mlp": 104, "qkv": 240, "layer": 260, "layer_narrow": 260}
PIECE = 3  # of the time of a sweep, for every micro-batch


class Predictor:
    """Bytes and operations of a model that is easy to reckon with; counts how often it is asked."""

    def __init__(self, flops=EVEN):
        self.flops, self.asked = flops, []

    def __call__(self, setting):
        self.asked.append(setting)
        layers = DEPTH // setting.num_blocks
        policy, samples = POLICIES[setting.recompute], setting.micro_batch
        # all but the last have twice as many bytes to a unit
        grown = policy.units * layers * samples // (1 + policy.narrow) + 5 * samples
        pieces = BATCH // setting.micro_batch
        return {
            offload: Estimate(
                peak_bytes=30 * held + 10 + grown,
                by_category=parts(parameters=10 * held, optimizer=20 * held, temporaries=grown),
                flops=self.flops[setting.recompute],
                ops=PIECE * pieces,
                swapped=0 if offload == "none" else 2,
            )
            for offload, held in (("none", DEPTH), ("cpu", layers))
        }


def parts(**sizes):
    return {**dict.fromkeys(CATEGORIES, 0), **sizes}


def seconds(estimate, num_blocks):
    return estimate.flops + estimate.ops + estimate.swapped


def plans(num_blocks, limit, flops=EVEN):
    predict = Predictor(flops)
    found = plans_of(
        num_blocks, predict, batch=BATCH, limit=limit, seconds=seconds, policies=list(POLICIES)
    )
    return found, predict


def tried_out(num_blocks, limit, flops):
    """The fastest of all that fit, by trying each."""
    predict, best = Predictor(flops), []
    for offload in ("none",) if num_blocks == 1 else ("none", "cpu"):
        fitting = [
            (seconds(estimate, num_blocks), setting)
            for recompute in POLICIES
            for size in (1, 2, 4, 8, 16, 32, 64)
            for setting in [Setting(num_blocks, recompute, size)]
            if (estimate := predict(setting)[offload]).peak_bytes <= limit
        ]
        best += [(min(time for time, _ in fitting), offload)] if fitting else []
    return best


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("limit", [0, 60, 200, 380, 390, 420, 630, 700, 1200, 3000, 9000])
@pytest.mark.parametrize("flops", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_finds_the_fastest_that_fits_and_asks_for_each_once(num_blocks, limit, flops):
    found, predict = plans(num_blocks, limit, flops)
    best = [(plan.seconds, plan.offload) for plan in found.fitting]
    assert best == tried_out(num_blocks, limit, flops)
    assert all(plan.estimate.peak_bytes <= limit for plan in found.fitting)
    assert all(plan.setting.num_blocks == num_blocks for plan in found.fitting)
    assert len(set(predict.asked)) == len(predict.asked)


def test_where_everything_fits_one_prediction_does():
    found, predict = plans(4, 10**6)
    assert predict.asked == [Setting(4, "none", BATCH)]
    assert [plan.setting for plan in found.fitting] == [found.whole.setting] * 2
    assert [plan.offload for plan in found.fitting] == ["none", "cpu"]


def test_where_nothing_fits_two_predictions_do_and_the_smallest_is_named():
    found, predict = plans(4, 0)
    assert predict.asked == [Setting(4, "none", BATCH), Setting(4, "layer_narrow", 1)]
    assert found.fitting == []
    assert (found.smallest.setting, found.smallest.offload) == (
        Setting(4, "layer_narrow", 1),
        "cpu",
    )
    assert found.whole.offload == "none"


def test_few_predictions_find_a_micro_batch():
    _, predict = plans(1, 1200)
    assert len(predict.asked) <= 14, "of 42 that there are"


def test_one_block_has_one_way_of_being_on_the_device():
    found, _ = plans(1, 10**6)
    assert [plan.offload for plan in found.fitting] == ["none"]


def test_time_is_operations_and_calls_and_swaps():
    speed = Speed(float32=2e12, bfloat16=2e13, link=2e9)
    estimate = Estimate(0, {}, flops=10**12, ops=1000)
    assert speed.seconds(estimate, 4, autocast=False) == pytest.approx(1.005)
    assert speed.seconds(estimate, 4, autocast=True) == pytest.approx(0.105)


def test_swaps_take_a_twentieth_of_the_time():
    speed = Speed(float32=2e12, bfloat16=2e12, link=2e9)
    estimate = Estimate(0, {}, flops=10**12, ops=0, swapped=10**10)
    assert speed.seconds(estimate, 4, autocast=False) == pytest.approx(1 / 0.95, rel=0.001)
    small = Estimate(0, {}, flops=10**12, ops=0, swapped=10**6)
    assert speed.seconds(small, 4, autocast=False) == pytest.approx(1.001)


def test_every_target_has_a_speed():
    assert set(SPEEDS) == set(TARGETS)


def test_the_smallest_setting_has_a_layer_in_each_block():
    assert smallest_setting(28, ("none", "layer")) == Setting(28, "layer", 1)


def test_stem_and_head_are_what_no_number_of_blocks_divides():
    everything = Estimate(0, parts(parameters=70, optimizer=140, temporaries=9), 0, 0)
    one = Estimate(0, parts(parameters=25, optimizer=50, temporaries=9), 0, 0)
    outside = outside_layers({"none": everything, "cpu": one}, 4)
    assert outside == {"parameters": 10, "optimizer": 20}
    estimate = Estimate(250, everything.by_category, 0, 0)
    found = shares(estimate, outside)
    assert found["parameters"] == 60 and found["optimizer"] == 120 and found["temporaries"] == 9
    assert found["stem_and_head"] == 30 and found[FREE] == 31
    assert sum(found.values()) == estimate.peak_bytes
