"""A small classifier of digits, whose features the demo measures generated digits in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.data.images import ImageData, batch_indices
from dbkernels.training.evaluation import batches

FEATURES = 32
STEPS = 400
BATCH_SIZE = 128
KEY = 1  # block of the sample order, which has one stream per block


class DigitClassifier(nn.Module):
    """8 x 8 images (B, 1, 8, 8) to logits (B, 10), through FEATURES numbers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURES),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.relu(self.features(image)))


def train_classifier(data: ImageData, seed: int) -> DigitClassifier:
    """Train on the real digits, end to end; a few seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        indices = batch_indices(len(data), BATCH_SIZE, seed=seed, block=KEY, step=step)
        batch = data.batch(indices)
        F.cross_entropy(model(batch["image"]), batch["label"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images, in [0, 1], that the classifier gives their label."""
    return float((model(images).argmax(-1) == labels).float().mean())


@torch.no_grad()
def features_of(model: DigitClassifier, images: Tensor) -> Tensor:
    """(N, FEATURES) of images (N, 1, 8, 8)."""
    return model.features(images)


def all_images(data: ImageData) -> tuple[Tensor, Tensor]:
    """Every image and label of a small data set."""
    ((batch, _),) = batches(data, len(data), "cpu")
    return batch["image"], batch["label"]
