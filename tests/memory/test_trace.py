from dbkernels.memory.trace import CATEGORIES, START, Event, Moment, Trace

PARAMETERS, TEMPORARIES = CATEGORIES.index("parameters"), CATEGORIES.index("temporaries")


def trace():
    events = [Event(START, 0, 100), Event(0, 1, 50), Event(1, 1, -50), Event(1, 2, 50)]
    return Trace(["forward: a", "backward: b"], events, [PARAMETERS, TEMPORARIES, TEMPORARIES])


def by_category(**sizes):
    return tuple(sizes.get(name, 0) for name in CATEGORIES)


def test_every_event_has_a_moment():
    totals = [(moment.total_bytes, moment.op) for moment in trace().moments()]
    assert totals == [(100, START), (150, 0), (100, 1), (150, 1)]


def test_the_peak_is_the_first_of_the_highest_moments():
    assert trace().peak() == Moment(150, by_category(parameters=100, temporaries=50), 0)


def test_a_run_without_events_has_a_peak_of_nothing():
    assert Trace([], [], []).peak() == Moment(0, by_category(), START)


def test_ops_are_named_and_the_start_is():
    assert [trace().name(op) for op in (START, 0, 1)] == ["start", "forward: a", "backward: b"]


def test_what_stands_beside_a_run_is_there_at_its_peak():
    peak = trace().beside([("optimizer", 30), ("parameters", 5)]).peak()
    assert peak.total_bytes == 185 and peak.op == 0
    assert peak.by_category == by_category(parameters=105, optimizer=30, temporaries=50)
    assert trace().peak().total_bytes == 150


def test_the_same_run_with_other_sizes():
    doubled = [Event(e.op, e.storage, 2 * e.delta_bytes) for e in trace().events]
    assert trace().of(doubled).peak().total_bytes == 300
