"""Data sets of other libraries, through the interfaces that these have for torch."""

import json

import numpy as np
import pytest
import torch
from training.tiny import assert_same, copies, make_blocks, make_data, make_trainer

from dbkernels.data.dataset import as_data
from dbkernels.training.trainer import Trainer

COUNT = 10
KEYS = ("image", "label")


@pytest.fixture
def of_hugging_face():
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    whole = make_data(COUNT).batch(torch.arange(COUNT))
    columns = {name: tensor.tolist() for name, tensor in whole.items()}
    columns["text"] = ["a"] * COUNT
    return datasets.Dataset.from_dict(columns).with_format("torch")


@pytest.fixture
def shard(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset")
    whole, path = make_data(COUNT).batch(torch.arange(COUNT)), tmp_path / "a-000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for index in range(COUNT):
            image, label = (whole[name][index].numpy() for name in KEYS)
            writer.write({"__key__": f"{index:03}", "image.npy": image, "label.cls": int(label)})
    return webdataset, str(path)


def make_other(data, **settings):
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, "keys": KEYS, **settings}
    return Trainer(make_blocks(), data, **settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_table_of_hugging_face_is_data_by_index(of_hugging_face, workers):
    plain, other = make_trainer(), make_other(of_hugging_face, workers=workers)
    plain.run(), other.run()
    assert_same(other, plain)
    batch = as_data(of_hugging_face, keys=KEYS).batch(torch.tensor([3, 1]))
    assert batch["image"].shape == (2, 1, 4, 4) and batch["label"].tolist() == [0, 1]


def test_a_stream_of_hugging_face_goes_on_where_it_says_that_it_was(of_hugging_face):
    def make():
        stream = of_hugging_face.to_iterable_dataset().repeat(None)
        return make_other(stream.batch(4))

    whole, first, second = (make() for _ in range(3))
    whole.run()
    for _ in range(5):
        first.step_block(first.next_block())
    counters = json.loads(json.dumps(first.counters()))
    assert counters["stream"]["batches"] == 5 and counters["stream"]["state"]
    second.restore(copies(first), counters)
    second.run()
    ours, theirs = copies(second), copies(whole)
    assert all(torch.equal(ours[g][n], theirs[g][n]) for g in ours for n in ours[g])
    assert second.counters()["step"] == whole.counters()["step"]


@pytest.mark.parametrize("workers", [None, 1])
def test_a_webdataset_is_a_stream(shard, workers):
    webdataset, path = shard

    def make():
        data = webdataset.WebDataset(path, shardshuffle=False).decode()
        data = data.to_tuple("image.npy", "label.cls").repeat().batched(4, partial=False)
        if workers is not None:
            data = webdataset.WebLoader(data, batch_size=None, num_workers=workers)
        met = []

        def objective(blocks, block, batch, draw):
            met.append(batch)
            return blocks.loss(block, batch, draw)

        return make_other(data, objective=objective), met

    (whole, met), (first, _), (second, _) = (make() for _ in range(3))
    for trainer in (whole, first):
        for _ in range(4):
            trainer.step_block(trainer.next_block())
    expected = make_data(COUNT).batch(torch.arange(4))
    assert torch.equal(met[0]["image"], expected["image"])
    assert met[0]["label"].tolist() == expected["label"].tolist() and np.shape(met) == (4,)
    second.restore(copies(first), first.counters())
    for trainer in (whole, second):
        trainer.step_block(trainer.next_block())
    assert_same(second, whole)
