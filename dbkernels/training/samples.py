"""Where the samples of a step come from: this process, workers, or a stream of batches."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol, cast

import torch
from torch.utils.data import Dataset

from dbkernels.data.dataset import Keys, as_data
from dbkernels.data.images import Batch, Data, Put, batch_indices
from dbkernels.data.stream import Place, Stream, is_stream
from dbkernels.data.workers import EVERY, Coming, Workers
from dbkernels.settings import check_number
from dbkernels.training.pending import Pieces, cut, read_pieces
from dbkernels.training.trainer_config import TrainerConfig

MOST_WORKERS = 1024
STREAM = "stream"  # name of a stream's place among the counters of a checkpoint


class Samples(Protocol):
    """The samples of the steps of a run.

    data:  that they are of
    """

    @property
    def data(self) -> Data | Iterable[object]: ...

    def of_step(self, block: int, step: int, put: Put) -> Pieces:
        """The samples of a step of a block, by the block's own count, brought by `put`.

        Raises:
            ValueError: they cannot be read, here or when the pieces are.
        """

    def expect(self, coming: Coming) -> None:
        """Learn which steps will be asked for, as `Workers` takes it."""

    def place(self) -> dict[str, Place]:
        """What the counters of a checkpoint must hold of them, by name."""

    def check(self, counters: object) -> object:
        """The counters of a checkpoint without what `place` gave.

        Raises:
            ValueError: they hold something else, or nothing.
        """

    def go_on(self, counters: dict[str, object]) -> None:
        """Go on from the place in counters that `check` let through.

        Raises:
            ValueError: a stream ends before it.
        """

    def close(self) -> None:
        """End what runs beside the steps; a step begins it again."""


def open_samples(
    source: Data | Dataset | Iterable[object],
    keys: Keys | None,
    workers: int,
    config: TrainerConfig,
    *,
    device: torch.device,
    share: slice = EVERY,
) -> Samples:
    """The samples of a run; `Trainer` says what its arguments are.

    Args:
        share:  of the samples of each step, those that this process takes

    Raises:
        ValueError: the source is no data, or does not go with keys or workers.
    """
    check_number("workers", workers, 0, MOST_WORKERS)
    if is_stream(source):
        if workers:
            raise ValueError(
                f"workers must be 0 for the stream {type(source).__name__}, whose own loader has "
                f"them, got {workers}"
            )
        return FromStream(Stream(source, config.batch_size, keys), share)
    here = Here(as_data(source, keys), config, share)
    if not workers:
        return here
    size, seed, gpu = config.batch_size, config.seed, device.type == "cuda"
    return FromWorkers(
        here,
        Workers(here.data, workers, batch_size=size, seed=seed, on_gpu=gpu, share=share),
        share,
    )


class Here:
    """Samples that this process reads, in each step: no more of them at a time than a piece."""

    def __init__(self, data: Data, config: TrainerConfig, share: slice):
        self.data, self._config, self._share = data, config, share

    def of_step(self, block: int, step: int, put: Put) -> Pieces:
        of_step = {"seed": self._config.seed, "block": block, "step": step}
        indices = batch_indices(len(self.data), self._config.batch_size, **of_step)
        return partial(read_pieces, self.data, indices[self._share], put)

    def expect(self, coming: Coming) -> None:
        pass

    def place(self) -> dict[str, Place]:
        return {}

    def check(self, counters: object) -> object:
        if isinstance(counters, dict) and STREAM in counters:
            raise ValueError(
                "data must be a stream, as that of the checkpoint is, "
                f"got {type(self.data).__name__}"
            )
        return counters

    def go_on(self, counters: dict[str, object]) -> None:
        pass

    def close(self) -> None:
        pass


class FromWorkers(Here):
    """Samples that workers have read before; those of a step out of order this process reads."""

    def __init__(self, here: Here, workers: Workers, share: slice):
        super().__init__(here.data, here._config, share)
        self._workers = workers

    def of_step(self, block: int, step: int, put: Put) -> Pieces:
        batch = self._workers.take(block, step)
        if batch is None:
            return super().of_step(block, step, put)
        return partial(_put_pieces, batch, put, self._workers.finish)

    def expect(self, coming: Coming) -> None:
        self._workers.expect(coming)

    def close(self) -> None:
        self._workers.close()


class FromStream:
    """Samples in the order of a stream, whatever block they are for.

    Each of several processes reads all of it, and takes its share.
    """

    def __init__(self, stream: Stream, share: slice):
        self._stream, self.data, self._share = stream, stream.source, share

    def of_step(self, block: int, step: int, put: Put) -> Pieces:
        mine = {name: tensor[self._share] for name, tensor in self._stream.next().items()}
        return partial(_put_pieces, mine, put, _as_it_is)

    def expect(self, coming: Coming) -> None:
        pass

    def place(self) -> dict[str, Place]:
        return {STREAM: self._stream.place()}

    def check(self, counters: object) -> object:
        if not isinstance(counters, dict) or STREAM not in counters:
            raise ValueError(
                "a checkpoint of a stream must say how much of it was read, got one of data that "
                "are read by index"
            )
        self._stream.check(counters[STREAM])
        return {name: value for name, value in counters.items() if name != STREAM}

    def go_on(self, counters: dict[str, object]) -> None:
        self._stream.go_on(cast(Place, counters[STREAM]))

    def close(self) -> None:
        pass


def _put_pieces(
    batch: Batch, put: Put, finish: Callable[[Batch], Batch], size: int
) -> Iterator[Batch]:
    """As `read_pieces`, of a batch on the host."""
    for piece in cut(batch, size):
        yield finish({name: put(tensor) for name, tensor in piece.items()})


def _as_it_is(batch: Batch) -> Batch:
    return batch
