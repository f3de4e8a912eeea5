"""A small classifier of digits, in whose features the demo compares generated and real digits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 32
STEPS = 400
BATCH_SIZE = 128


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

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images, in [0, 1], to which the classifier gives their label."""
        return float((self(images).argmax(-1) == labels).float().mean())


def train_classifier(images: Tensor, labels: Tensor, seed: int) -> DigitClassifier:
    """Train on real digits (N, 1, 8, 8), end to end; takes a few seconds."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=random)
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
