"""Batches that come in an order of their own, such as those of a DataLoader."""

from collections.abc import Iterable, Iterator
from typing import TypeGuard

from torch.utils.data import IterableDataset

from dbkernels.data.dataset import Keys, check_keys, gives_batches, named_tensors
from dbkernels.data.images import Batch

Place = dict[str, object]  # of a stream, as JSON has it


def is_stream(source: object) -> TypeGuard[Iterable[object]]:
    """Whether batches can be had from it one after another, and not by the index of a sample."""
    by_index = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if gives_batches(source) or (by_index and not isinstance(source, IterableDataset)):
        return False
    return hasattr(source, "__iter__")


class Stream:
    """The batches of an iterable, one for each step of a run, in their order.

    A run that goes on reads on behind the batches that it had read: a new stream skips so many,
    or is told its state, where it has `state_dict` and `load_state_dict`.

    Args:
        source:      gives batches: dicts of tensors or arrays (B, ...), or tuples with keys
        batch_size:  B, of every batch
        keys:        as for `DatasetBatches`
    """

    def __init__(self, source: Iterable[object], batch_size: int, keys: Keys | None = None):
        self.source, self.batch_size, self.keys = source, batch_size, check_keys(keys)
        self.count = 0  # of batches that were read
        self._batches: Iterator[object] | None = None
        self._expected: dict[str, str] = {}

    def next(self) -> Batch:
        """The next batch, on the host.

        Raises:
            ValueError: there is none, or it is no whole step of samples like those before it.
        """
        if self._batches is None:
            self._batches = iter(self.source)
        batch = named_tensors(self._next(), self.keys, where := f"batch {self.count}")
        for name, tensor in batch.items():
            if tensor.shape[:1] != (self.batch_size,):
                got = f"{len(tensor)}" if tensor.dim() else "a number"
                raise ValueError(
                    f"{name} of {where} must have batch_size = {self.batch_size} samples, got "
                    f"{got}; drop_last=True of a DataLoader leaves a short one out"
                )
        got = {name: f"{tuple(t.shape[1:])} {t.dtype}" for name, t in sorted(batch.items())}
        self._expected = self._expected or got
        if got != self._expected:
            raise ValueError(f"samples of {where} must have {self._expected} as before, got {got}")
        self.count += 1
        return batch

    def _next(self) -> object:
        try:
            return next(self._batches)
        except StopIteration:
            raise ValueError(
                f"{self._name} must have a batch for every step, got its end after {self.count}: "
                "give a generator that begins it again, or train fewer steps"
            ) from None

    @property
    def _name(self) -> str:
        return f"the stream {type(self.source).__name__}"

    @property
    def _tells(self) -> bool:
        return all(hasattr(self.source, name) for name in ("state_dict", "load_state_dict"))

    def place(self) -> Place:
        """Where the next batch is."""
        return {
            "batches": self.count,
            **({"state": self.source.state_dict()} if self._tells else {}),
        }

    def check(self, place: object) -> None:
        """Refuse what `place` of such a stream never gave, and a place that is behind it.

        Raises:
            ValueError: it is that.
        """
        names = set(self.place())
        if not isinstance(place, dict) or place.keys() != names:
            expected = ", ".join(sorted(names))
            raise ValueError(f"the place of {self._name} must have {expected}, got {place!r:.80}")
        count = place["batches"]
        if type(count) is not int or count < 0:
            raise ValueError(f"batches of {self._name} must be a whole number from 0, got {count}")
        if not self._tells and self._once() and count < self.count:
            raise ValueError(
                f"{self._name} must be new to go on behind {count} batches, got one of which "
                f"{self.count} were read"
            )

    def _once(self) -> bool:
        """Whether it cannot begin again."""
        return isinstance(self.source, Iterator)

    def go_on(self, place: Place) -> None:
        """Have the next batch be that of a place that `check` let through.

        Raises:
            ValueError: the stream ends before it.
        """
        if self._tells:
            self.source.load_state_dict(place["state"])
            self.count, self._batches = place["batches"], None
            return
        if not self._once() or self._batches is None:
            self.count, self._batches = 0, iter(self.source)
        while self.count < place["batches"]:
            self._next()
            self.count += 1
