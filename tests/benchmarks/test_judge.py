"""The classifier that judges generated images."""

import pytest
import torch
import torch.nn.functional as F

from dbkernels import open_data


@pytest.fixture
def judge(bench, monkeypatch):
    """The module; its training is short."""
    module = bench("judge")
    monkeypatch.setattr(module, "STEPS", 120)
    return module


def bright(count, shape, classes):
    """Images whose label is how bright they are."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=random)
    noise = 0.05 * torch.randn(count, *shape, generator=random)
    return labels.view(-1, 1, 1, 1) / classes + noise, labels


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 6), (4, 3, 3)])
@pytest.mark.parametrize("classes", [2, 5])
def test_learns_images_of_any_size_and_number_of_classes(judge, shape, classes):
    images, labels = bright(200, shape, classes)
    found = judge.train_classifier(images, labels, seed=0)
    assert found.classes == classes and found.network(images[:4]).shape == (4, classes)
    assert found.accuracy(images, labels) > 0.9 > 0.5 > found.accuracy(images, 1 - labels)
    assert found.features(images).shape == (200, 32) and not found.network.training
    assert torch.equal(found.real, found.features(images)) and not found.real.requires_grad


def test_digits_are_judged_by_the_network_that_they_always_were(judge):
    network = judge.Classifier((1, 8, 8), 10)
    first, of_first, second, of_second, features, of_features, head, of_head = network.parameters()
    images, _ = bright(5, (1, 8, 8), 4)
    full = F.conv2d(images, first, of_first, padding=1).relu()
    half = F.conv2d(full, second, of_second, stride=2, padding=1).relu()
    found = F.linear(half.flatten(1), features, of_features)
    assert found.shape == (5, 32)
    judged = judge.Judge(network, 10, found.detach()).features(images)
    assert torch.equal(judged, found)
    assert torch.equal(network(images), F.linear(found.relu(), head, of_head))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((1, 28, 28), [2, 2, 2]), ((3, 6, 9), [2, 2]), ((1, 8, 5), [1, 2]), ((4, 4, 3), [1])],
)
def test_large_images_are_halved_at_once_and_all_until_no_side_is_over_four(judge, shape, strides):
    body = judge.Classifier(shape, 3).body
    assert [part.stride[0] for part in body if hasattr(part, "stride")] == strides
    assert max(body[: 2 * len(strides)](torch.zeros(1, *shape)).shape[2:]) <= 4


def test_training_is_a_function_of_the_seed_and_leaves_the_random_state(judge):
    data, before = bright(100, (1, 8, 8), 4), torch.random.get_rng_state()
    first, again, other = (
        judge.train_classifier(*data, seed=s).network.state_dict() for s in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_many_images_are_learned_for_more_steps(judge, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: asked.append(1))
    judge.train_classifier(*bright(100, (1, 4, 4), 2), seed=0)
    assert len(asked) == 120
    judge.train_classifier(*bright(4800, (1, 4, 4), 2), seed=0)
    assert len(asked) == 120 + 150


def test_images_are_judged_some_at_a_time(judge, monkeypatch):
    images, labels = bright(100, (1, 8, 8), 4)
    found = judge.train_classifier(images, labels, seed=0)
    whole = found.accuracy(images, labels), found.features(images)
    monkeypatch.setattr(judge, "AT_ONCE", 7)
    assert found.accuracy(images, labels) == whole[0]
    torch.testing.assert_close(found.features(images), whole[1])


def test_what_is_far_from_real_ones_is_neither_precise_nor_recalled(judge):
    images, labels = bright(300, (1, 8, 8), 4)
    found = judge.train_classifier(images, labels, seed=0)
    assert found.distance(images) == pytest.approx(0, abs=1e-4)
    assert found.precision_recall(images) == (1, 1)
    far = 5 + torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert found.distance(far) > 10
    assert found.precision_recall(far) == (0, 0)
    # one class of four, beside as many of all
    precision, recall = found.precision_recall(images[labels == 2])
    assert precision > 0.9 > 0.5 > recall > 0.1


def test_as_many_are_compared_of_what_is_made_as_of_what_is_real(judge, monkeypatch):
    sizes = []
    monkeypatch.setattr(judge, "precision_recall", lambda *sets: sizes.append([*map(len, sets)]))
    monkeypatch.setattr(judge, "MOST_COMPARED", 50)
    images, labels = bright(100, (1, 4, 4), 2)
    found = judge.train_classifier(images, labels, seed=0)
    # real ones are evenly spaced
    assert torch.equal(found.real, found.features(images[::2]))
    for some in (images, images[:20]):
        found.precision_recall(some)
    assert sizes == [[50, 50], [20, 20]]


def test_the_judge_of_a_place_learns_its_training_images_once_and_on_one_thread(judge, monkeypatch):
    threads, seen, train = [], [], judge.train_classifier

    def told(images, labels, seed):
        threads.append(torch.get_num_threads())
        seen.append((images, labels))
        return train(images, labels, seed)

    monkeypatch.setattr(judge, "train_classifier", told)
    monkeypatch.setattr(judge, "MOST_LEARNED", 700)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = judge.judge_of("digits")
        assert judge.judge_of("digits") is found and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        judge.judge_of.cache_clear()
    assert threads == [1] and found.classes == 10
    [(images, labels)] = seen
    batch = open_data("digits").batch(torch.arange(1437))
    # evenly spaced
    assert len(images) == 700 and torch.equal(images[350], batch["image"][718])
    assert labels[350] == batch["label"][718]


def test_test_images_are_judged_as_if_they_were_drawn(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench("judge"), "STEPS", 1)
    monkeypatch.setattr(bench("judge"), "PASSES", 0)
    bench("judge").main("digits", images=50)
    said = capsys.readouterr().out
    found, data = bench("judge").judge_of("digits"), open_data("digits", "test")
    image = data.batch(torch.arange(50) * len(data) // 50)["image"]
    assert said.startswith(f"50 test images: Fréchet distance {found.distance(image):.2f}, ")
    with pytest.raises(ValueError, match="images must be at least 2, got 1"):
        bench("judge").main("digits", images=1)
