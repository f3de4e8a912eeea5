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
    "shift": ("image", lambda batch, draw: shift(batch, draw, pixels=2)),
    "mirror": ("image", mirror),
    "drop_labels": ("label", lambda batch, draw: drop_labels(batch, draw, share=0.5, null=9)),
}


@pytest.fixture(params=CHANGES)
def change(request):
    """What a change makes of its own tensor of a batch; nothing else may change."""
    own, function = CHANGES[request.param]

    def changed(batch, draw):
        copies = {name: tensor.clone() for name, tensor in batch.items()}
        after = function(batch, draw)
        assert after.keys() == batch.keys()
        assert all(after[name] is batch[name] for name in batch if name != own)
        assert all(torch.equal(batch[name], copies[name]) for name in batch)
        assert not torch.equal(after[own], batch[own])
        assert (after[own].dtype, after[own].shape) == (batch[own].dtype, batch[own].shape)
        return after[own]

    return changed


def test_a_change_is_a_function_of_the_draw(change):
    batch = make_batch(40)
    first, second, other = (change(batch, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not torch.equal(change(batch, Draw(1, step=1)), first)


def test_a_step_in_memory_is_that_of_the_integer(change):
    batch, step = make_batch(40), torch.tensor(0)
    for value in (0, 1, 2**40):
        step.fill_(value)
        expected = change(batch, Draw(1, value, sample=3))
        assert torch.equal(change(batch, Draw(1, step, sample=3)), expected)


def test_a_sample_changes_alike_in_a_batch_that_is_cut(change):
    batch = make_batch(40)
    rest = {name: tensor[13:] for name, tensor in batch.items()}
    assert torch.equal(change(batch, seeded())[13:], change(rest, Draw(1, 0, sample=13)))


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
    for _, change in CHANGES.values():
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
