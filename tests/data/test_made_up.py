import torch

from dbkernels.data.made_up import Field, MadeUpData

FIELDS = {"image": Field((3, 4, 5), torch.float32), "label": Field((), torch.int64, 10)}


def test_a_batch_has_the_fields_of_its_samples_and_is_the_same_every_time():
    data, puts = MadeUpData(FIELDS, 700), []
    batch = data.batch(torch.arange(600), lambda tensor: puts.append(tensor) or tensor)
    assert len(data) == 700 and len(puts) == 2
    assert batch["image"].shape == (600, 3, 4, 5) and batch["image"].dtype == torch.float32
    assert batch["label"].shape == (600,) and batch["label"].dtype == torch.int64
    assert batch["label"].min() == 0 and batch["label"].max() == 9
    assert abs(batch["image"].std().item() - 1) < 0.02
    again = data.batch(torch.arange(100, 700))
    assert all(torch.equal(again[name], batch[name]) for name in batch)
