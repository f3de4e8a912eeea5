"""The file is safetensors', whatever lies in it, and nothing is held but a piece of a tensor."""

import hashlib
import io
import math

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import dbkernels.training.tensor_file as tensor_file
from dbkernels.training.tensor_file import DTYPES, pieces, write_tensors


def made(dtype, shape, random):
    size = math.prod(shape) * dtype.itemsize
    bits = torch.randint(2 if dtype == torch.bool else 256, (size,), generator=random)
    return bits.to(torch.uint8).view(dtype).view(shape)


def written(named, **options):
    file = io.BytesIO()
    size, digest = write_tensors(file, named, **options)
    data = file.getvalue()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    return data


@pytest.mark.parametrize("piece", [8, 64, 2**23])
def test_the_library_reads_every_bit_of_every_dtype_shape_and_stride(monkeypatch, piece):
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", piece)
    random, named = torch.Generator().manual_seed(0), {}
    for dtype in DTYPES:
        for shape in ((), (0, 3), (1,), (5, 7), (2, 3, 4)):
            tensor = made(dtype, shape, random)
            named[f"é{dtype}{shape}"] = tensor
            named[f"t{dtype}{shape}"] = tensor.movedim(0, -1) if shape else tensor
    named |= {"n": torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag}
    data = written(named)
    read = safetensors.torch.load(data)
    assert read.keys() == named.keys()
    for name, tensor in named.items():
        ours, theirs = tensor.contiguous().view(-1), read[name].contiguous().view(-1)
        assert (tensor.shape, tensor.dtype) == (read[name].shape, read[name].dtype)
        assert torch.equal(ours.resolve_neg().view(torch.uint8), theirs.view(torch.uint8)), name
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0
    assert safetensors.torch.load(written({})) == {}


class Storages(TorchDispatchMode):
    """Bytes of the largest storage that an op makes."""

    largest = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if is_tensor(t)}
        out = op(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_iter(out)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in before:
                self.largest = max(self.largest, storage.nbytes())
        return out


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def test_no_more_is_held_than_a_piece_or_one_tensor_that_is_not_contiguous(monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 512)
    named = {str(i): torch.ones(64, 100) for i in range(4)}
    with Storages() as seen:
        written(named, finite=True)
    assert 0 < seen.largest <= 512
    with Storages() as seen:
        written({"t": named["0"].t(), **named})
    assert seen.largest == named["0"].nbytes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_number_that_is_not_finite_is_refused_where_it_is_asked(monkeypatch, dtype, bad):
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 64)
    tensor = torch.zeros(100, dtype=dtype)
    tensor[70] = bad
    named = {"a": torch.ones(3), "count": torch.ones(3, dtype=torch.int64), "weight": tensor}
    with pytest.raises(FloatingPointError, match=r"must be finite to be saved, got .* weight$"):
        written(named, finite=True)
    assert safetensors.torch.load(written(named)).keys() == named.keys()


def test_a_tensor_that_gets_a_gradient_is_read_as_it_is():
    parameter = torch.nn.Parameter(torch.arange(3.0))
    (piece,) = pieces(parameter)
    assert torch.equal(piece.view(torch.float32), parameter.detach())
