"""A small classifier of real images, which judges those that a model generates.

    python benchmarks/judge.py PLACE [--images 500]

says how near unseen real images come, which is as near as a model can. It is as good a judge as its
features are: compare distances that one judge gave.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tyro.conf import Positional

from dbkernels import open_data
from dbkernels.cli.sentence import in_a_sentence
from dbkernels.data.images import Batch
from dbkernels.data.rows import spaced
from dbkernels.data.spaced import Spaced
from dbkernels.metrics import PrecisionRecall, frechet_distance, precision_recall
from dbkernels.settings import check_number
from dbkernels.training.threads import cpu_threads

FEATURES = 32  # in which images are compared
CHANNELS = 16, 32  # of the first convolution, and of those that halve what it gives
HELD_SIDE = 8  # the first convolution halves an image of which a side is longer
LEAST_SIDE = 4  # the others halve it until no side is longer
STEPS, PASSES, BATCH = 400, 4, 128  # of training, which is as long as the steps and the passes
MOST_LEARNED, MOST_COMPARED = 60_000, 2000  # real images
AT_ONCE = 2048  # images judged together


class Classifier(nn.Module):
    """Images (B, C, H, W) to logits (B, classes), through FEATURES numbers.

    Args:
        shape:    (C, H, W) of an image
        classes:  how many there are
    """

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        (channels, *sides), (count, halved) = shape, CHANNELS
        stride = 2 if max(sides) > HELD_SIDE else 1
        body = [nn.Conv2d(channels, count, 3, stride=stride, padding=1), nn.ReLU()]
        sides = [-(-side // stride) for side in sides]
        while max(sides) > LEAST_SIDE:
            body += [nn.Conv2d(count, halved, 3, stride=2, padding=1), nn.ReLU()]
            count, sides = halved, [-(-side // 2) for side in sides]
        self.body = nn.Sequential(
            *body, nn.Flatten(), nn.Linear(count * sides[0] * sides[1], FEATURES)
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).relu())


@dataclass(frozen=True, eq=False)
class Judge:
    """Compares images with real ones, in the features of a classifier that learned these.

    network:  the classifier
    classes:  how many it knows
    real:     (M, FEATURES) float32, of at most MOST_COMPARED real images, evenly spaced
    """

    network: Classifier
    classes: int
    real: Tensor

    def features(self, images: Tensor) -> Tensor:
        """What images (N, C, H, W) are compared in, (N, FEATURES) float32."""
        return _some_at_a_time(self.network.body, images)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images, in [0, 1], to which the classifier gives their label."""
        answers = _some_at_a_time(self.network, images).argmax(-1)
        return float((answers == labels).float().mean())

    def distance(self, images: Tensor) -> float:
        """Fréchet distance of images (N, C, H, W) to the real ones."""
        return frechet_distance(self.features(images), self.real)

    def precision_recall(self, images: Tensor) -> PrecisionRecall:
        """How much of images (N, C, H, W) looks real, and how much of the real is among them.

        As many are compared of both: the denser of two sets would look the more alike.
        """
        made, real = (
            each[torch.from_numpy(spaced(len(each), min(len(images), len(self.real))))]
            for each in (self.features(images), self.real)
        )
        return precision_recall(made, real)


@cache
def judge_of(place: str) -> Judge:
    """The judge of some images, trained once in a process, on one thread.

    Args:
        place:  what `dbkernels train --data` takes: digits, fashion, or a path of images or latents
    """
    data = open_data(place)
    with cpu_threads(1):
        batch = _everything(Spaced(data, MOST_LEARNED))
        return train_classifier(batch["image"], batch["label"], seed=0)


def train_classifier(images: Tensor, labels: Tensor, seed: int) -> Judge:
    """A judge that learned real images; 60,000 of 28 x 28 take 20 s of one core.

    Args:
        images:  (N, C, H, W) float32
        labels:  (N,) int64
        seed:    of the weights and of the batches
    """
    random, classes = torch.Generator().manual_seed(seed), int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(tuple(images.shape[1:]), classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(max(STEPS, PASSES * len(images) // BATCH)):
        chosen = torch.randint(len(images), (BATCH,), generator=random)
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    compared = images[torch.from_numpy(spaced(len(images), MOST_COMPARED))]
    return Judge(model.eval(), classes, _some_at_a_time(model.body, compared))


def main(place: Positional[str], /, images: int = 500) -> None:
    """Judge test images of some data as if a model had drawn them.

    Args:
        place:   what `dbkernels train --data` takes: digits, fashion, or a path
        images:  at most so many, evenly spaced; of fewer a distance is larger
    """
    check_number("images", images, 2)
    judge, data = judge_of(place), open_data(place, "test")
    batch = _everything(Spaced(data, min(images, len(data))))
    image, label = batch["image"], batch["label"]
    precision, recall = judge.precision_recall(image)
    print(
        f"{len(image)} test images: Fréchet distance {judge.distance(image):.2f}, precision "
        f"{precision:.3f}, recall {recall:.3f}, recognised {judge.accuracy(image, label):.3f}"
    )


def _everything(data: Spaced) -> Batch:
    return data.batch(torch.arange(len(data)))


@torch.no_grad()
def _some_at_a_time(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(some) for some in images.split(AT_ONCE)])


if __name__ == "__main__":
    with in_a_sentence():
        tyro.cli(main)
