import pytest

from dbkernels.memory.levels import levels
from dbkernels.memory.predict import predict
from dbkernels.memory.trace import CATEGORIES, START, Event, Trace
from dbkernels.memory.workspace import TARGETS

PARAMETERS, SAVED = CATEGORIES.index("parameters"), CATEGORIES.index("saved_activations")


def prediction():
    """Parameters of 100 bytes; four ops keep 10 each and four let them go; the last two do both."""
    names = ["forward: a"] * 3 + ["forward: idle"] + ["forward: a"] + ["backward: b"] * 4
    names += ["backward: norm", "optimizer: c", "c"]
    events = [Event(START, 0, 100)]
    events += [Event(op, 1 + i, 10) for i, op in enumerate((0, 1, 2, 4))]
    events += [Event(op, 1 + i, -10) for i, op in enumerate((5, 6, 7, 8))]
    for i, op in enumerate((10, 11)):
        events += [Event(op, 5 + i, 7), Event(op, 5 + i, -7)]
    return predict(Trace(names, events, [PARAMETERS] + [SAVED] * 6), TARGETS["cpu"])


def test_each_op_that_changes_something_has_its_highest_moment():
    found = levels(prediction(), parts=100)
    assert found.starts == list(range(11))
    assert found.by_category["parameters"] == [100] * 11
    assert found.by_category["saved_activations"] == [0, 10, 20, 30, 40, 30, 20, 10, 0, 7, 7]
    assert set(found.by_category) == set(CATEGORIES)
    assert found.totals == [100, 110, 120, 130, 140, 130, 120, 110, 100, 107, 107]


def test_phases_begin_where_their_first_op_stands_and_the_update_follows_the_backward():
    assert levels(prediction(), parts=100).phases == [
        ("forward", 1),
        ("backward", 5),
        ("update", 9),
    ]


def test_parts_are_equal_and_each_is_at_its_highest():
    found = levels(prediction(), parts=3)
    assert found.starts == [0, 3, 7]
    assert found.totals == [120, 140, 110]
    assert found.phases == levels(prediction(), parts=100).phases


@pytest.mark.parametrize("parts", [1, 2, 5, 7])
def test_the_peak_is_in_any_number_of_parts(parts):
    found = levels(prediction(), parts=parts)
    assert max(found.totals) == prediction().peak_allocated_bytes
    assert len(found.starts) == len(found.totals) == parts


def test_on_a_gpu_the_allocators_blocks_count():
    events = [Event(START, 0, 1), Event(0, 1, 513), Event(1, 1, -513)]
    trace = Trace(["forward: a", "backward: b"], events, [PARAMETERS, SAVED])
    found = levels(predict(trace, TARGETS["h100"]), parts=9)
    assert found.by_category["parameters"] == [512] * 3
    assert found.by_category["saved_activations"] == [0, 1024, 0]


def test_there_is_a_part():
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        levels(prediction(), parts=0)
