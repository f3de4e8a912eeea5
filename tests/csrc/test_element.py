"""The stores and loads of element.h, one number at a time, against those of torch."""

import math
import struct

import pytest
import torch

from dbkernels.ops import _maths

STORES = {"bfloat16": _maths.to_bfloat16, "float16": _maths.to_float16}
LOADS = {"bfloat16": _maths.from_bfloat16, "float16": _maths.from_float16}
PLACES = {"bfloat16": 16, "float16": 13}  # of float32 that a rounding drops
NAMES = sorted(STORES)


def bits_of(x):
    return x.view(torch.int16).int() & 0xFFFF


def float_of(bits):
    return struct.unpack("f", struct.pack("I", bits))[0]


def assert_stored(name, numbers):
    expected = bits_of(numbers.to(getattr(torch, name))).tolist()
    for x, y in zip(numbers.tolist(), expected, strict=True):
        assert STORES[name](x) == y, x.hex()


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_loaded_and_stored_again(name):
    bits = torch.arange(2**16)
    wide = bits.to(torch.int16).view(getattr(torch, name)).float()
    for y, x in zip(bits.tolist(), wide.tolist(), strict=True):
        loaded = LOADS[name](y)
        if math.isnan(x):
            assert math.isnan(loaded)
        else:
            assert (loaded, math.copysign(1, loaded)) == (x, math.copysign(1, x))
            assert STORES[name](x) == y


# halfway between two neighbours, and one bit of float32 to each side of it
@pytest.mark.parametrize("name", NAMES)
def test_rounds_to_nearest_and_halves_to_even(name):
    places = PLACES[name]
    kept = torch.arange(0, 2**31, (2**31 // 3001) >> places << places)[:, None]
    half = 2 ** (places - 1)
    bits = (kept + torch.tensor([0, 1, half - 1, half, half + 1])).flatten()
    bits = bits[bits <= 0x7F800000].int()
    numbers = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    assert_stored(name, numbers)
    # an odd neighbour below
    assert_stored(name, (bits[bits % 2**places == half] ^ 2**places).view(torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_and_the_greatest(name):
    limits = torch.finfo(getattr(torch, name))
    unit = limits.tiny * limits.eps
    factors = [0.25, 0.5, 0.5 + 2**-20, 0.75, 1, 1.5, 2.5, 3.5, 1 / limits.eps - 0.5]
    numbers = [unit * f for f in factors]
    numbers += [limits.max, limits.max * (1 + limits.eps / 4), float_of(0x7F7FFFFF), math.inf, 0.0]
    numbers += [65503.9, 65519.99, 65520.0, 65535.9, 65536.0, 131072.0]
    numbers = torch.tensor(numbers)
    assert_stored(name, torch.cat([numbers, -numbers]))


# the first has its mark only in places that a store drops
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_nan(name, bits):
    assert math.isnan(LOADS[name](STORES[name](float_of(bits))))
