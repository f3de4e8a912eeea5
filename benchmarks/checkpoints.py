"""What a checkpoint costs: how long steps wait, when it is durable, and what a load notices.

    python benchmarks/checkpoints.py --threads 1

One row is one way to save the same numbers: `ours`, a save that the steps wait for; `ours beside`,
by a thread; `DCP` and `DCP beside`, of torch.distributed.checkpoint; `torch.save` with a flush. Of
two processes each holds half of the rows of every tensor. Steps, which are products of matrices, go
on until the checkpoint is durable: what they take longer than without a save is *slowed*. Then bits
of the files are flipped, one at a time, and each time the checkpoint is loaded; a thread's files
are like those of a save that steps wait for, and are left alone.
"""

import json
import os
import random
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from machine import machine
from program import Known, Program, called, main
from show import Row
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as CutInRows

from dbkernels.training import checkpoint
from dbkernels.training.checkpoint import Box, Saver, Shard

MiB = 2**20
COLUMNS = 1024  # numbers in a row of each tensor
TENSORS = 32
ROW_BYTES = 4 * COLUMNS
QUIET = 20  # steps without a save


@dataclass(frozen=True)
class Options(Program):
    """Time the saves of some tensors of float32, and flip bits of what they wrote."""

    mib: int = 96  # of all tensors, and of all processes together
    processes: tuple[int, ...] = (1, 2)
    product: int = 512  # rows and columns of the matrices of a step
    rounds: int = 3  # saves of each way
    flips: int = 20
    folder: Path | None = None  # on the disk to measure; one in the system's temporary directory

    def __post_init__(self):
        self.require_positive("product", "rounds", "threads", "mib")
        self.require_positive("flips", least=0)
        for count in self.processes:
            # of each tensor, which all processes hold as many rows of
            if count < 1 or self.mib * MiB // ROW_BYTES % (TENSORS * count):
                raise ValueError(f"processes must divide the rows of {self.mib} MiB, got {count}")

    def key_of(self, processes: int, impl: str) -> Row:
        """What a row is known by."""
        about = {"state_bytes": self.mib * MiB, "product": self.product}
        return {"suite": "checkpoints", "processes": processes, "impl": impl, **about}

    def wanted(self) -> list[Row]:
        return [self.key_of(n, impl) for n in self.processes for impl in ways_of(n)]

    def tables(self, known: Known) -> Iterator[Iterable[Row]]:
        for processes in self.processes:
            if any(known.lacks(self.key_of(processes, impl)) for impl in ways_of(processes)):
                yield self._rows(processes)

    def _rows(self, processes: int) -> Iterator[Row]:
        about = machine(self.on) | {"command": called()}
        with tempfile.TemporaryDirectory(dir=self.folder) as directory:
            folder = Path(directory)
            args = self, processes, folder
            torch.multiprocessing.spawn(measure, args=args, nprocs=processes)
            found = json.loads((folder / "found.json").read_text())
            for impl, figures in found.items():
                counts = {"flips": self.flips, "noticed": None}
                if not impl.endswith("beside"):
                    counts["noticed"] = noticed_by(WAYS[impl].load, folder / impl, self.flips)
                yield self.key_of(processes, impl) | figures | counts | about


# ways to save


class Held:
    """What a process holds: rows of each tensor.

    Args:
        options:    of the benchmark
        processes:  of which each holds as many rows
    """

    def __init__(self, options: Options, processes: int):
        self.rank, rows = dist.get_rank(), options.mib * MiB // ROW_BYTES // TENSORS
        own = rows // processes
        generator = torch.Generator(options.on).manual_seed(self.rank)
        shape, first = (own, COLUMNS), self.rank * own
        self.local = {
            f"layers.{index}.w": torch.randn(
                shape, generator=generator, device=options.on, dtype=torch.float32
            )
            for index in range(TENSORS)
        }
        box = Box((first, 0), shape, 0)
        self.parts = {n: Shard(t, (rows, COLUMNS), (box,)) for n, t in self.local.items()}
        mesh = init_device_mesh(options.on.type, (processes,))
        self.cut = {
            name: DTensor.from_local(tensor, mesh, [CutInRows(0)], run_check=False)
            for name, tensor in self.local.items()
        }
        self.group = dist.group.WORLD


class Ours:
    """The save of this library, which the steps wait for."""

    prunes = True  # the older ones

    def __init__(self, held: Held):
        self.held = held

    def save(self, root: Path, step: int) -> None:
        checkpoint.save(root, step, {"model": self.held.parts}, {}, keep=1, group=self.held.group)

    def busy(self) -> bool:
        return False

    def wait(self) -> None:
        pass

    @staticmethod
    def load(root: Path) -> None:
        checkpoint.load(checkpoint.latest(root))


class OursBeside(Ours):
    """By a thread."""

    def __init__(self, held: Held):
        super().__init__(held)
        self.saver = Saver(group=held.group)

    def save(self, root: Path, step: int) -> None:
        self.saver.save(root, step, {"model": self.held.parts}, {}, keep=1)

    def busy(self) -> bool:
        return self.saver.busy

    def wait(self) -> None:
        self.saver.wait()


class Dcp(Ours):
    """torch.distributed.checkpoint."""

    prunes = False

    def save(self, root: Path, step: int) -> None:
        dcp.save(self.state(), checkpoint_id=root / str(step))

    def state(self) -> dict[str, Tensor]:
        return dict(self.held.cut if dist.get_world_size() > 1 else self.held.local)

    @staticmethod
    def load(root: Path) -> None:
        (path,) = root.iterdir()
        kinds = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {n: torch.empty(k.size, dtype=k.properties.dtype) for n, k in kinds.items()}
        dcp.load(state, checkpoint_id=path, no_dist=True)


class DcpBeside(Dcp):
    """Its async_save."""

    future: Future | None = None

    def save(self, root: Path, step: int) -> None:
        self.future = dcp.async_save(self.state(), checkpoint_id=root / str(step))

    def busy(self) -> bool:
        return not self.future.done()

    def wait(self) -> None:
        self.future.result()


class TorchSave(Ours):
    """One file of torch, flushed."""

    prunes = False

    def save(self, root: Path, step: int) -> None:
        root.mkdir(exist_ok=True)
        with (root / str(step)).open("wb") as file:
            torch.save(self.held.local, file)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def load(root: Path) -> None:
        (path,) = root.iterdir()
        torch.load(path, weights_only=True)


WAYS: dict[str, type[Ours]] = {
    "ours": Ours, "ours beside": OursBeside, "DCP": Dcp, "DCP beside": DcpBeside,
    "torch.save": TorchSave,
}  # fmt: skip


def ways_of(processes: int) -> list[str]:
    """Those that save what so many processes hold."""
    return [impl for impl in WAYS if processes == 1 or impl != "torch.save"]


# what they cost


def measure(rank: int, options: Options, processes: int, folder: Path) -> None:
    """Save in turn, in one of the processes; the first writes what it took."""
    warnings.simplefilter("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    held, step = Held(options, processes), step_of(options)
    ways = {impl: WAYS[impl](held) for impl in ways_of(processes)}
    times: dict[str, list[tuple[float, float, float]]] = {impl: [] for impl in ways}
    for number in range(1 + options.rounds):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for impl in order:
            took = timed(ways[impl], folder / impl, number, step)
            times[impl] += [took] if number else []  # the first one finds cold memory
    figures = {
        impl: list(map(statistics.median, zip(*t, strict=True))) for impl, t in times.items()
    }
    if not rank:
        names = ("stall_ms", "slowed_ms", "durable_ms")
        rows = {impl: dict(zip(names, found, strict=True)) for impl, found in figures.items()}
        for impl, row in rows.items():
            row["disk_bytes"] = sum(path.stat().st_size for path in files_of(folder / impl))
        (folder / "found.json").write_text(json.dumps(rows))
    dist.barrier()
    # an interpreter that ends may find threads of the process group at work, and abort
    os._exit(0)


def step_of(options: Options) -> Callable[[], float]:
    """A step, which gives its own time in ms."""
    a = torch.ones(options.product, options.product, device=options.on, dtype=torch.float32)

    def step() -> float:
        begin = perf_counter()
        (a @ a).sum().item()
        return 1e3 * (perf_counter() - begin)

    return step


def timed(
    way: Ours, root: Path, number: int, step: Callable[[], float]
) -> tuple[float, float, float]:
    """Save, and take steps until it is durable; ms that they stood still, were slower, and all."""
    quiet = statistics.median(step() for _ in range(QUIET))
    if not dist.get_rank() and not way.prunes:
        shutil.rmtree(root, ignore_errors=True)
    os.sync()
    dist.barrier()
    begin = perf_counter()
    way.save(root, number)
    stall = 1e3 * (perf_counter() - begin)
    taken = []
    while way.busy():
        taken.append(step())
    way.wait()
    durable = 1e3 * (perf_counter() - begin)
    return stall, max(sum(taken) - quiet * len(taken), 0.0), durable


# what a load notices


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def noticed_by(load: Callable[[Path], None], root: Path, flips: int) -> int:
    """Of so many flips of a bit of a checkpoint, one at a time, how many a load refuses."""
    rng, found = random.Random(0), 0
    files = files_of(root)
    sizes = [path.stat().st_size for path in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(root)
        for _ in range(flips):
            (path,) = rng.choices(files, sizes)
            place, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
            flip(path, place, bit)
            try:
                load(root)
            except Exception:  # whatever each library raises
                found += 1
            flip(path, place, bit)
    return found


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))


if __name__ == "__main__":
    main(Options)
