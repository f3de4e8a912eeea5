"""Seeds for independent streams of random numbers, each a pure function of its key."""

import hashlib
import struct

import torch


def stream_seed(*key: int) -> int:
    """Hash a key to the seed of its own stream, the same on every machine.

    Args:
        key:  integers in the range of int64, such as (seed, block, step); their order counts
    Returns:
        A seed in [0, 2**63).
    Raises:
        ValueError: a part of the key is not an integer of 64 bits.
    """
    try:
        packed = struct.pack(f"<{len(key)}q", *key)
    except struct.error as error:
        raise ValueError(f"a stream's key must be 64-bit integers, got {key}") from error
    # one bit less than the digest, so that the seed fits a signed 64-bit integer
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Start the random stream of a key.

    Args:
        device:  where the numbers will be drawn; devices draw different numbers from one seed
        key:     as for stream_seed
    Returns:
        A generator on the device, at the beginning of the key's stream.
    Raises:
        ValueError: a part of the key is not an integer of 64 bits.
    """
    return torch.Generator(device).manual_seed(stream_seed(*key))
