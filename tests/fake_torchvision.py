"""What torchvision offers of what is used here: a RandAugment that tells what it was given."""

from types import ModuleType

import torch


class RandAugment:
    """Adds a number to all pixels; it may be any, from torch's own generator."""

    def __init__(self):
        self.seen = []

    def __call__(self, image):
        assert image.dtype == torch.uint8 and image.ndim == 3
        self.seen.append(image)
        return image + torch.randint(256, (), dtype=torch.uint8)


def modules():
    """By name, for `sys.modules`."""
    package, transforms, v2 = (
        ModuleType(f"torchvision{rest}") for rest in ("", ".transforms", ".transforms.v2")
    )
    package.transforms, transforms.v2, v2.RandAugment = transforms, v2, RandAugment
    return {module.__name__: module for module in (package, transforms, v2)}
