from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from dbkernels.data import augment
from dbkernels.data.augment import drop_labels, mirror, shift
from dbkernels.ops.philox import Draw, uniforms


def seeded(seed=1):
    return Draw(seed, step=0)


def make_batch(count, shape=(2, 3, 5)):
    return {
        "image": torch.randn(count, *shape, generator=torch.Generator().manual_seed(7)),
        "label": torch.arange(count) % 9,
        "mask": torch.ones(count),
    }


CHANGES = {
    "shift": lambda batch, draw: shift(batch, draw, pixels=2),
    "mirror": mirror,
    "drop_labels": lambda batch, draw: drop_labels(batch, draw, share=0.5, null=9),
}
every = pytest.mark.parametrize("name", CHANGES)


@every
def test_only_what_is_named_changes_and_the_batch_given_does_not(name):
    batch = make_batch(40)
    copies = {key: value.clone() for key, value in batch.items()}
    changed = CHANGES[name](batch, seeded())
    assert changed.keys() == batch.keys()
    own = "label" if name == "drop_labels" else "image"
    assert all(changed[key] is batch[key] for key in batch if key != own)
    assert not torch.equal(changed[own], batch[own])
    assert changed[own].dtype == batch[own].dtype and changed[own].shape == batch[own].shape
    assert all(torch.equal(batch[key], copies[key]) for key in batch)


@every
def test_a_change_is_a_function_of_the_draw(name):
    own, batch = "label" if name == "drop_labels" else "image", make_batch(40)
    first, second, other = (CHANGES[name](batch, seeded(seed))[own] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not torch.equal(CHANGES[name](batch, Draw(1, step=1))[own], first)


@every
def test_a_step_in_memory_is_that_of_the_integer(name):
    own, batch = "label" if name == "drop_labels" else "image", make_batch(40)
    step = torch.tensor(0)
    for value in (0, 1, 2**40):
        step.fill_(value)
        expected = CHANGES[name](batch, Draw(1, value, sample=3))[own]
        assert torch.equal(CHANGES[name](batch, Draw(1, step, sample=3))[own], expected)


@every
def test_a_sample_changes_alike_in_a_batch_that_is_cut(name):
    own, batch = "label" if name == "drop_labels" else "image", make_batch(40)
    rest = {key: value[13:] for key, value in batch.items()}
    whole, part = CHANGES[name](batch, seeded()), CHANGES[name](rest, Draw(1, 0, sample=13))
    assert torch.equal(whole[own][13:], part[own])


def test_purposes_have_numbers_of_their_own():
    batch = {"image": torch.zeros(300, 1, 8, 8)}
    draw = seeded()
    numbers = [augment._numbers(draw, purpose, batch["image"]) for purpose in range(4)]
    for i, first in enumerate(numbers):
        for second in [*numbers[i + 1 :], uniforms(draw, 300)]:
            assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.2


def test_no_two_changes_share_a_purpose(monkeypatch):
    used, numbers = [], augment._numbers

    def recorded(draw, purpose, like):
        used.append(purpose)
        return numbers(draw, purpose, like)

    monkeypatch.setattr(augment, "_numbers", recorded)
    for change in CHANGES.values():
        change(make_batch(4), seeded())
    assert sorted(used) == [augment.DROP, augment.MIRROR, augment.ROWS, augment.COLUMNS]


def test_the_share_of_labels_that_are_dropped():
    batch = make_batch(20_000)
    label = drop_labels(batch, seeded(), share=0.1, null=9)["label"]
    dropped = label == 9
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(label[~dropped], batch["label"][~dropped])


def test_no_label_or_every_label_is_dropped():
    batch = make_batch(100)
    assert torch.equal(drop_labels(batch, seeded(), share=0.0, null=9)["label"], batch["label"])
    assert (drop_labels(batch, seeded(), share=1.0, null=9)["label"] == 9).all()


def test_half_of_the_images_are_mirrored_left_to_right():
    batch = make_batch(4000)
    image = mirror(batch, seeded())["image"]
    flipped = batch["image"][..., [4, 3, 2, 1, 0]]
    same = (image == batch["image"]).flatten(1).all(1)
    mirrored = (image == flipped).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_images_move_by_every_offset_equally_often_and_repeat_their_border():
    count, (H, W) = 2250, (3, 5)
    batch = make_batch(count)
    image = shift(batch, seeded(), pixels=1)["image"]
    padded = F.pad(batch["image"], (1, 1, 1, 1), mode="replicate")
    moves = Counter()
    for top in range(3):
        for left in range(3):
            crop = padded[:, :, top : top + H, left : left + W]
            moves[top, left] = int((image == crop).flatten(1).all(1).sum())
    assert sum(moves.values()) == count
    assert all(170 < times < 330 for times in moves.values())


def test_a_move_may_be_larger_than_the_image():
    batch = make_batch(200)
    image = shift(batch, seeded(), pixels=50)["image"]
    corner = batch["image"][:, :, 2:, 4:].expand_as(image)
    assert (image == corner).flatten(1).all(1).any()


def test_no_pixels_is_no_move_and_the_image_is_contiguous():
    batch = make_batch(10)
    assert torch.equal(shift(batch, seeded(), pixels=0)["image"], batch["image"])
    assert shift(batch, seeded(), pixels=2)["image"].is_contiguous()
