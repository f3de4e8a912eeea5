import pytest
import torch
from models.two_processes import WORLD, work
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    args = f"file://{folder / 'rendezvous'}", str(folder / "results.safetensors")
    torch.multiprocessing.spawn(work, args=args, nprocs=WORLD)
    return load_file(args[1])


def by_name(found, way, recompute):
    prefix = f"{way}/{recompute}/"
    return {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(way, recompute, found):
    alone, halves = by_name(found, "alone", recompute), by_name(found, way, recompute)
    torch.testing.assert_close(halves.pop("out"), alone.pop("out")[:2])
    assert halves.keys() == alone.keys() and len(alone) == 12
    for name, grad in alone.items():
        # both average over the processes, the loss is a sum
        torch.testing.assert_close(WORLD * halves[name], grad, msg=name)


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_weights_sharded_in_float64_may_be_gathered_in_bfloat16(recompute, found):
    alone, halves = by_name(found, "alone", recompute), by_name(found, "fsdp bfloat16", recompute)
    assert halves.pop("out").dtype == torch.bfloat16
    for name, grad in halves.items():
        assert grad.dtype == torch.float64
        error = (WORLD * grad - alone[name]).norm() / alone[name].norm()
        assert error < 0.05, name
