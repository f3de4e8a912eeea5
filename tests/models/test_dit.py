import torch
from models.tiny import CONFIGS, LEVEL, make_batch, make_model

from dbkernels.models import FAMILIES, DiT


def test_the_target_is_the_image_and_the_estimate_the_prediction():
    model = make_model("dit")
    batch, prediction = make_batch(model), torch.randn(3, 3, 6, 6)
    assert model.target(batch) is batch["image"] and model.estimate(prediction) is prediction


def test_the_unconditional_batch_uses_the_last_row():
    model = make_model("dit")
    batch = {**make_batch(model), "mask": torch.ones(3)}
    without = model.unconditional(batch)
    assert without["label"].tolist() == [4, 4, 4] and without["label"].dtype == torch.int64
    assert FAMILIES["dit"].null_label(model.config) == 4
    assert without["image"] is batch["image"] and without["mask"] is batch["mask"]
    assert batch["label"].tolist() == [3, 0, 2]
    model.denoise(torch.randn(3, 3, 6, 6), LEVEL, (0,), without).sum().backward()
    assert model.label_table.weight.grad.any(1).tolist() == [False] * 4 + [True]


def test_positions_are_not_saved_and_move_with_the_model():
    model = DiT(CONFIGS["dit"])
    assert "positions" not in model.state_dict()
    assert "positions" in dict(model.named_buffers())
