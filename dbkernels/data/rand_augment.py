"""RandAugment of a batch, sample by sample: torchvision's policy with random numbers of the step.

Cubuk et al. 2020 (arXiv:1909.13719). torchvision draws from torch's own generator, which is set to
a seed of each sample's own. So a sample's change depends neither on the samples beside it nor on
what was drawn before, and the generator goes on as if nothing had been drawn.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dbkernels.data.images import Batch, Data, ImageData, pixels_of, scaled
from dbkernels.ops.philox import Draw, stream_seed

Policy = Callable[[Tensor], Tensor]  # pixels (C, H, W) uint8 to others, by torch's own generator

CHANNELS = 1, 3  # of images that the policy can change
# ends the key of a sample's policy, so that no other user of (seed, step, sample) shares its stream
_POLICY_STREAM = 2


def rand_augment(batch: Batch, draw: Draw, *, policy: Policy) -> Batch:
    """Change each image by a policy: "image" (B, C, H, W) float32, that `ImageData` gave of pixels.

    The policy has the pixels themselves, which are bytes; what it gives is scaled as they are.

    Args:
        batch:   of which the image alone is changed
        draw:    of the batch's samples; a step in memory is read, which waits for a GPU
        policy:  such as `policy_for` gives
    """
    changed, step = [], int(draw.step)
    with torch.random.fork_rng(devices=[]):
        for sample, pixels in enumerate(pixels_of(batch["image"]), draw.sample):
            seed = stream_seed(draw.seed, step, sample, _POLICY_STREAM)
            torch.default_generator.manual_seed(seed)
            changed.append(policy(pixels))
    return {**batch, "image": scaled(torch.stack(changed))}


def policy_for(data: Data) -> Policy:
    """torchvision's RandAugment with its own settings, for the images of some data.

    Raises:
        ValueError: the data are no pixels of 1 or 3 channels, or torchvision is missing or was made
            for another torch.
    """
    if not isinstance(data, ImageData) or data.images.dtype != np.uint8:
        kind = data.images.dtype if isinstance(data, ImageData) else type(data).__name__
        raise ValueError(f"rand_augment needs images of pixels, which are uint8, got {kind}")
    if data.image_shape[0] not in CHANNELS:
        raise ValueError(f"rand_augment needs images of 1 or 3 channels, got {data.image_shape[0]}")
    try:
        from torchvision.transforms import v2
    except ImportError:
        raise ValueError(
            "torchvision must be installed for rand_augment (pip install dbkernels[augment]), "
            "got an environment without it"
        ) from None
    except RuntimeError as error:
        # its own ops are missing where it was built for another torch
        raise ValueError(
            f"torchvision must be of the same build as torch {torch.__version__}, got {error}"
        ) from None
    policy: Policy = v2.RandAugment()
    return policy
