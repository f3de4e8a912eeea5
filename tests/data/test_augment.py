from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from dbkernels.data.augment import drop_conditions, mirror, shift
from dbkernels.ops.philox import Draw, uniforms

DRAW = Draw(seed=1, step=0)


def make_batch(count, shape=(2, 3, 5)):
    return {
        "image": torch.randn(count, *shape, generator=torch.Generator().manual_seed(7)),
        "label": torch.arange(count) % 9,
        "mask": torch.ones(count),
    }


def drop_labels(batch, draw, share=0.5):
    """A 9 asks for nothing."""
    nothing = {**batch, "label": torch.full_like(batch["label"], 9)}
    return drop_conditions(batch, draw, share=share, unconditional=lambda _: nothing)


CHANGES = {
    "shift": ("image", lambda batch, draw: shift(batch, draw, pixels=2)),
    "mirror": ("image", mirror),
    "drop_conditions": ("label", drop_labels),
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
        assert after[own].is_contiguous()
        return after[own]

    return changed


def test_a_change_is_a_function_of_the_draw_and_of_the_sample_alone(change):
    batch, step = make_batch(40), torch.tensor(0)
    first, again, *others = (change(batch, Draw(*d)) for d in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)
    # a batch that is cut
    rest = {name: tensor[13:] for name, tensor in batch.items()}
    assert torch.equal(change(rest, Draw(1, 0, sample=13)), first[13:])
    # a step in memory is that of the integer
    for value in (0, 1, 2**40):
        step.fill_(value)
        expected = change(batch, Draw(1, value, sample=3))
        assert torch.equal(change(batch, Draw(1, step, sample=3)), expected)


def test_changes_are_independent_of_each_other_and_of_the_noise():
    image = torch.arange(81.0).view(1, 1, 9, 9).expand(400, 1, 9, 9)
    batch = {"image": image, "label": torch.zeros(400, dtype=torch.int64)}
    moved = shift(batch, DRAW, pixels=4)["image"][:, 0, 4, 4]
    dropped = drop_labels(batch, DRAW)["label"]
    mirrored = mirror(batch, DRAW)["image"][:, 0, 0, 0]
    made = moved // 9, moved % 9, dropped, mirrored, uniforms(DRAW, 400)
    correlation = torch.corrcoef(torch.stack([each.float() for each in made]))
    assert correlation.fill_diagonal_(0).abs().max() < 0.2


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_share_of_labels_that_are_dropped(share):
    batch = make_batch(20_000)
    label = drop_labels(batch, DRAW, share)["label"]
    dropped = label == 9
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.01 * (0 < share < 1))
    assert torch.equal(label[~dropped], batch["label"][~dropped])


def test_half_of_the_images_are_mirrored_left_to_right():
    batch = make_batch(4000)
    image = mirror(batch, DRAW)["image"]
    same = (image == batch["image"]).flatten(1).all(1)
    mirrored = (image == batch["image"][..., [4, 3, 2, 1, 0]]).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_images_move_by_every_offset_equally_often_and_repeat_their_border():
    count, (H, W) = 2250, (3, 5)
    batch = make_batch(count)
    image = shift(batch, DRAW, pixels=1)["image"]
    padded = F.pad(batch["image"], (1, 1, 1, 1), mode="replicate")
    moves = Counter()
    for top in range(3):
        for left in range(3):
            crop = padded[:, :, top : top + H, left : left + W]
            moves[top, left] = int((image == crop).flatten(1).all(1).sum())
    assert sum(moves.values()) == count
    assert all(170 < times < 330 for times in moves.values())


def test_a_move_may_be_larger_than_the_image_or_none():
    batch = make_batch(200)
    image = shift(batch, DRAW, pixels=50)["image"]
    corner = batch["image"][:, :, 2:, 4:].expand_as(image)
    assert (image == corner).flatten(1).all(1).any()
    assert torch.equal(shift(batch, DRAW, pixels=0)["image"], batch["image"])


def test_all_that_a_sample_asks_for_is_dropped_together():
    text, pooled, image = torch.ones(50, 3, 2), torch.ones(50, 4), torch.ones(50, 1)
    batch = {"text": text, "pooled": pooled, "image": image}
    nothing = {"text": 0 * text, "pooled": 0 * pooled, "image": image}
    after = drop_conditions(batch, DRAW, share=0.5, unconditional=lambda _: nothing)
    kept = after["pooled"][:, 0]
    assert set(kept.tolist()) == {0, 1} and after["image"] is image
    assert torch.equal(after["pooled"], kept[:, None].expand(50, 4))
    assert torch.equal(after["text"], kept[:, None, None].expand(50, 3, 2))
