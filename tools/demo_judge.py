"""A small classifier of digits, which judges those that a model generates."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.training.evaluation import frechet_distance

CLASSES = 10
FEATURES = 32  # in which digits are compared
STEPS, BATCH = 400, 128  # of its training


class DigitClassifier(nn.Sequential):
    """8 x 8 images (B, 1, 8, 8) to logits (B, 10), through FEATURES numbers."""

    def __init__(self):
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        features, head = nn.Linear(32 * 4 * 4, FEATURES), nn.Linear(FEATURES, CLASSES)
        super().__init__(
            first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), features, nn.ReLU(), head
        )

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images, in [0, 1], to which the classifier gives their label."""
        return float((self(images).argmax(-1) == labels).float().mean())

    @torch.no_grad()
    def distance(self, made: Tensor, images: Tensor) -> float:
        """Fréchet distance of some images to others, in the classifier's features."""
        features = nn.Sequential(*list(self)[:-2])
        return frechet_distance(features(made), features(images))


def train_classifier(images: Tensor, labels: Tensor, seed: int) -> DigitClassifier:
    """Train on real digits (N, 1, 8, 8), end to end; takes a few seconds."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), generator=random)
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
