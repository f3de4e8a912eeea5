"""What a step of each baseline moves, what it costs, and that it learns."""

import pytest
import torch
from baseline_case import DATA, DRAW, VIT, batch_of, loss_of, quadrants, shaken

from dbkernels import Trainer
from dbkernels.models.layer import AdaLNLayer
from dbkernels.ops.philox import Draw

STEPS = {  # by network and row, of which each learns
    ("vit", "end to end"): 10,
    ("vit", "end to end, checkpointed"): 10,
    ("vit", "diffusion blocks"): 14,
    ("vit", "diffusion blocks, unconditioned"): 20,
    ("vit", "greedy"): 25,
    ("vit", "forward-forward"): 110,
    ("vit", "contrastive forward-forward"): 20,
    ("vit", "noprop-dt"): 50,
    ("vit", "noprop-ct"): 50,
    ("vit", "noprop-fm"): 60,
    ("cnn", "end to end"): 60,
    ("cnn", "diffusion blocks"): 50,
    ("cnn", "noprop-dt"): 45,
    ("cnn", "noprop-ct"): 90,
    ("cnn", "noprop-fm"): 250,
}


def test_the_rows_are_those_that_are_tested(bench):
    assert set(bench("baselines").BASELINES) == set(STEPS)


@pytest.mark.parametrize(("network", "name"), STEPS)
def test_it_learns(make_baseline, network, name):
    row, unseen = make_baseline(network, name), quadrants(200, seed=1)
    trainer = Trainer(
        row.blocks, DATA, objective=row.objective, steps=STEPS[network, name],
        batch_size=32, lr=1e-2,
    )  # fmt: skip
    assert trainer.total_steps == STEPS[network, name] * len(row.blocks)
    trainer.run()
    assert row.accuracy(unseen) > 0.55
    assert row.blocks.training


@pytest.mark.parametrize(("network", "name"), STEPS)
def test_an_answer_is_a_distribution_that_reads_no_label(make_baseline, network, name):
    row, batch = make_baseline(network, name), batch_of()
    found = row.answer(batch, DRAW)
    assert found.shape == (6, 3) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.sum(1), torch.ones(6))
    assert torch.equal(row.answer({"image": batch["image"]}, DRAW), found)
    # one image's answer is its own
    few = {name: tensor[:2] for name, tensor in batch.items()}
    torch.testing.assert_close(row.answer(few, DRAW), found[:2])


@pytest.mark.parametrize(("network", "name"), STEPS)
def test_a_loss_is_a_function_of_the_draw(make_baseline, network, name):
    row, same, other = (shaken(make_baseline(network, name, seed=seed)) for seed in (0, 0, 1))
    before = torch.get_rng_state()
    loss = loss_of(row)
    assert loss.shape == () and torch.equal(loss, loss_of(same))
    assert torch.equal(torch.get_rng_state(), before)
    assert loss_of(other) != loss
    drawn = not name.startswith(("end to end", "greedy")) or network == "cnn"
    assert (loss_of(row, draw=Draw(5, 4, 2)) != loss) == drawn


def test_random_layers_draw_what_the_step_names(make_baseline):
    row = make_baseline("vit", "greedy")
    row.loss = lambda block, batch, draw: torch.rand(())
    draws = DRAW, Draw(6, 3, 2), Draw(5, 4, 2), Draw(5, 3, 1)
    found = [loss_of(row, draw=draw).item() for draw in draws]
    assert len(set(found)) == 4 and loss_of(row).item() == found[0]


@pytest.mark.parametrize(("network", "name"), STEPS)
def test_a_step_moves_its_own_part_and_what_is_shared(make_baseline, network, name):
    row = shaken(make_baseline(network, name))
    groups = row.blocks.groups()
    shared = groups.get("shared", {})
    in_blocks = name.startswith("diffusion blocks")
    assert bool(shared) == ("noprop-dt" in name or in_blocks)
    for block in row.blocks:
        row.blocks.zero_grad()
        loss_of(row, block.index).backward()
        moved = {n for n, p in row.blocks.named_parameters() if p.grad is not None}
        assert moved == {*groups[f"block{block.index}"], *shared}
        layers = [n for n in moved if n.startswith("model.layers.")]
        if len(row.blocks) > 1 and not in_blocks:
            assert layers
            assert all(n.startswith(f"model.layers.{block.index}.") for n in layers)


@pytest.mark.parametrize(("network", "name"), STEPS)
def test_passes_are_counted(bench, make_baseline, network, name):
    kind = AdaLNLayer if network == "vit" else bench("baselines.cnn").CNN
    row, batch, samples = make_baseline(network, name), batch_of(), {True: 0, False: 0}

    def count(module, given):
        samples[torch.is_grad_enabled()] += len(given[0])

    counted = [module for module in row.blocks.modules() if isinstance(module, kind)]
    for module in counted:
        module.register_forward_pre_hook(count)
    for block in row.blocks:
        loss_of(row, block.index, batch)
    assert samples[False] / len(row.blocks) / 6 == pytest.approx(row.again)
    samples[False] = 0
    row.answer(batch, DRAW)
    assert samples[False] / len(counted) / 6 == row.forwards


@pytest.mark.parametrize(("network", "name"), STEPS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_other_images_have_their_own_sizes(make_baseline, network, name, shape):
    data = quadrants(4, seed=0, num_classes=2, shape=shape)
    row, batch = make_baseline(network, name, data), batch_of(data, 4)
    assert all(loss_of(row, block.index, batch).isfinite() for block in row.blocks)
    assert row.answer(batch, DRAW).shape == (4, 2)


# refusals


class Text:
    num_classes = 27


@pytest.mark.parametrize("network", ["vit", "cnn"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Text(), "images with labels, as open_data gives, got Text"),
        (quadrants(4, 0, shape=(1, 8, 12)), r"H = W, got \(1, 8, 12\)"),
        (quadrants(4, 0, num_classes=1), "2 classes or more, got 1"),
    ],
)
def test_refuses_other_data(make_baseline, network, data, message):
    with pytest.raises(ValueError, match=message):
        make_baseline(network, "noprop-dt", data)


def test_refuses_sizes_that_do_not_fit(bench, make_baseline):
    cnn = bench("baselines").CNNConfig()
    with pytest.raises(ValueError, match="forward-forward must be ViTConfig, got CNNConfig"):
        make_baseline("vit", "forward-forward", sizes=cnn)
    with pytest.raises(ValueError, match="diffusion blocks must be CNNConfig, got ViTConfig"):
        make_baseline("cnn", "diffusion blocks", sizes=VIT)
    with pytest.raises(ValueError, match="8 pixels to a side or more, got 4"):
        make_baseline("cnn", "noprop-fm", quadrants(4, 0, num_classes=2, shape=(1, 4, 4)))
    with pytest.raises(ValueError, match="embedding must be at least 0, got -1"):
        make_baseline("vit", "noprop-dt", embedding=-1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        make_baseline("cnn", "noprop-ct", steps=0)


@pytest.mark.parametrize(("network", "name"), STEPS)
def test_refuses_other_batches(make_baseline, network, name):
    row, batch = make_baseline(network, name), batch_of()
    image, label = batch["image"], batch["label"]
    for wrong, message in (
        ({"image": image}, "of each sample, got {'image'"),
        ({**batch, "image": image[:, :, :4]}, r"\(1, 4, 8\)"),
        ({**batch, "image": image.byte()}, "torch.uint8"),
        ({**batch, "label": label.float()}, "labels torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_of(row, batch=wrong)
