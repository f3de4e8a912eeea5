"""Several processes that train the same blocks have the numbers of one process."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from several import together
from training.parallel.agreeing import FOUR, TWO, found_in, train_cases

from dbkernels.training.checkpoint.shard import Box, check_tiles

BOUND = 1e-6  # of weights, which move by some 3e-3
OF_STATE = 3e-8  # of moments, which are as large as gradients
ROUNDED = ("autocast", "bfloat16", "bfloat16 replicas")  # of 8 bits, and in other places
APART = ("apart", "same half")
WORLDS = {name: 2 for name in TWO} | {name: 4 for name in FOUR}
CASES = TWO | FOUR


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What several processes have of a case; those of a world are started once."""

    @cache
    def folder_of(size):
        folder = tmp_path_factory.mktemp("cases")
        together(partial(train_cases, {2: TWO, 4: FOUR}[size], folder), size, folder)
        return folder

    return lambda name: found_in(folder_of(WORLDS[name]), name, WORLDS[name])


def clear(name, tensor):
    """Without the bias of keys: it moves no attention, and Adam makes steps of its rounding."""
    if not name.endswith("qkv.bias"):
        return tensor
    return torch.cat([tensor.chunk(3)[0], tensor.chunk(3)[2]])


def furthest(tensors, expected, groups):
    """Largest difference in some groups of a checkpoint."""
    assert tensors.keys() == expected.keys()
    return max(
        float((clear(name, tensors[name]) - clear(name, tensor)).abs().max())
        for name, tensor in expected.items()
        if name.startswith(groups) and tensor.numel()
    )


@pytest.mark.parametrize("case", [name for name in CASES if name not in (*ROUNDED, *APART)])
def test_they_have_the_weights_the_state_and_the_rows_of_one_process(found, case):
    tensors, rows, _ = found(case)
    expected, expected_rows = CASES[case].alone()
    assert furthest(tensors, expected, ("model", "ema")) < BOUND
    assert furthest(tensors, expected, "optimizer") < OF_STATE
    assert len(rows) == len(expected_rows) > 2
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=2e-6)


def moments(tensors):
    first = [t.flatten().float() for name, t in sorted(tensors.items()) if name.endswith("exp_avg")]
    return torch.cat(first)


@pytest.mark.parametrize("case", ROUNDED)
def test_in_bfloat16_they_are_no_further_than_one_process_from_float32(found, case):
    tensors, rows, _ = found(case)
    narrow, exact = CASES[case], replace(CASES[case], dtype=torch.float32)
    exact = replace(exact, trainer={**exact.trainer, "autocast": False})
    (own, own_rows), (expected, _) = narrow.alone(), exact.alone()
    assert {name: t.dtype for name, t in tensors.items()} == {n: t.dtype for n, t in own.items()}
    ours, alone = (float((moments(t) - moments(expected)).norm()) for t in (tensors, own))
    assert 0 < ours < 1.5 * alone
    for row, own_row in zip(rows, own_rows, strict=True):
        assert row == pytest.approx(own_row, rel=0.01)


@pytest.mark.parametrize("case", APART)
def test_without_what_they_tell_each_other_they_are_far_apart(found, case):
    tensors, *_ = found(case)
    expected, _ = CASES[case].alone()
    assert furthest(tensors, expected, "model") > 1000 * BOUND
    assert furthest(tensors, expected, "optimizer") > 1000 * OF_STATE


@pytest.mark.parametrize("case", ["vit none", "all blocks", "two by two vit", "tensor all blocks"])
def test_each_holds_a_share_of_its_own(found, case):
    tensors, _, held = found(case)
    assert all(own.keys() == held[0].keys() for own in held)
    apart = held[0].keys()
    layers = {name for name in tensors if ".layers." in name and name.endswith("qkv.weight")}
    assert layers and layers <= apart
    if "tensor" not in case:
        # all but the counts of steps
        assert {name for name in tensors if tensors[name].dim()} == apart
    for name in apart:
        shape = tensors[name].shape
        every = [Box(*map(tuple, box[:2]), box[2]) for own in held for box in own[name][2]]
        check_tiles(every, shape, name)
        for whole, local, _ in (own[name] for own in held):
            assert tuple(whole) == shape
            rows = -(-shape[0] // 2) if "tensor" not in case else shape[0]
            assert local[0] <= rows and local[1:] <= list(shape[1:])
    for name in layers:
        sizes = [torch.Size(own[name][1]).numel() for own in held]
        assert sizes == [tensors[name].numel() // len(held)] * len(held)


def test_a_process_may_hold_no_row_of_a_small_parameter(found):
    tensors, _, held = found("fewer rows than processes")
    name = "model/copies.0.head.bias"
    assert tensors[name].shape == (3,)
    assert [own[name][1] for own in held] == [[1], [1], [1], [0]]


def test_what_no_process_shares_is_whole_on_each(found):
    assert found("replicas vit").held == [{}, {}]
    _, _, held = found("tensor vit")
    assert {name for name in held[0] if "layers" not in name} == set()
