"""RandAugment of a batch by a policy that adds a number to all pixels of an image."""

import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from fake_torchvision import RandAugment, modules

from dbkernels.data.images import ImageData
from dbkernels.data.rand_augment import policy_for, rand_augment
from dbkernels.ops.philox import Draw

ADDS = RandAugment()


def data_of(shape=(3, 4, 5), dtype=np.uint8, count=40):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(dtype)
    return ImageData(pixels, torch.arange(count) % 3, 3)


def batch_of(data, start=0):
    return data.batch(torch.arange(start, len(data)))


def test_a_change_is_a_function_of_the_draw_and_of_the_sample_alone():
    batch = batch_of(data_of())
    copy, state = batch["image"].clone(), torch.get_rng_state()

    def changed(batch, *draw):
        after = rand_augment(batch, Draw(*draw), policy=ADDS)
        assert after["label"] is batch["label"] and after.keys() == batch.keys()
        return after["image"]

    first = changed(batch, 1, 0)
    assert torch.equal(batch["image"], copy) and torch.equal(torch.get_rng_state(), state)
    assert (first.dtype, first.shape) == (torch.float32, copy.shape) and first.is_contiguous()
    torch.manual_seed(5)
    assert torch.equal(changed(batch, 1, 0), first)
    for other in ((2, 0), (1, 1), (1, 0, 1)):
        assert not torch.equal(changed(batch, *other), first)
    # a batch that is cut
    assert torch.equal(changed(batch_of(data_of(), 13), 1, 0, 13), first[13:])
    assert torch.equal(changed(batch, 1, torch.tensor(0)), first)


def test_each_sample_has_a_number_of_its_own():
    data = data_of(shape=(1, 1, 1), count=4000)
    before = torch.from_numpy(data.images[:]).flatten().long()
    image = rand_augment(batch_of(data), Draw(1, 0), policy=ADDS)["image"]
    added = ((image.double() * 127.5 + 127.5).round().long().flatten() - before) % 256
    assert torch.bincount(added // 64).tolist() == pytest.approx([1000] * 4, abs=150)
    assert abs(float(torch.corrcoef(torch.stack([added[1:], added[:-1]]).double())[0, 1])) < 0.05


def test_a_policy_has_the_pixels_that_were_read_and_gives_pixels():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    batch, policy = batch_of(ImageData(pixels, torch.zeros(1).long(), 1)), RandAugment()
    rand_augment(batch, Draw(1, 0), policy=policy)
    assert np.array_equal(policy.seen[0], pixels[0])
    same = rand_augment(batch, Draw(1, 0), policy=lambda image: image)
    assert torch.equal(same["image"], batch["image"])


class Broken:
    """An import of torchvision that was built for another torch."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "torchvision" else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise RuntimeError("operator torchvision::nms does not exist")


@pytest.fixture
def offer(monkeypatch):
    """Has an import of torchvision find these modules, and no other."""

    def of(found):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in found.items():
            monkeypatch.setitem(sys.modules, name, module)

    return of


@pytest.mark.parametrize("channels", [1, 3])
def test_the_policy_is_that_of_torchvision(offer, channels):
    offer(modules())
    assert isinstance(policy_for(data_of((channels, 4, 4))), RandAugment)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (data_of(dtype=np.float32), "needs images of pixels, which are uint8, got float32"),
        ([1, 2], "needs images of pixels, which are uint8, got list"),
        (data_of((2, 4, 4)), "needs images of 1 or 3 channels, got 2"),
        (data_of(), r"torchvision must be installed .* \(pip install dbkernels\[augment\]\), got"),
    ],
)
def test_refuses_what_it_cannot_change(offer, data, message):
    offer({"torchvision": None})
    with pytest.raises(ValueError, match=message):
        policy_for(data)


def test_refuses_a_torchvision_of_another_torch(offer, monkeypatch):
    offer({})
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match=r"same build as torch 2\..*, got operator torchvision::n"):
        policy_for(data_of())
