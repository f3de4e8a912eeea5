"""The steps of a run: launched one after another, shown, and saved until the last."""

import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dbkernels.training import checkpoint
from dbkernels.training.log import RunLog
from dbkernels.training.parallel.job import launched
from dbkernels.training.pending import Row, Rows
from dbkernels.training.stop import Stopped, StopSignals
from dbkernels.training.trainer import Trainer


class Shown:
    """Writes rows to the log, where this process has one, and hands them on.

    Args:
        log:      None where another process of the job has it
        threads:  of the CPU, which the first row of a run tells; 0 or None is none
        on_row:   called with each row; where it fails, it is called no more
    """

    def __init__(
        self, log: RunLog | None, threads: int | str | None, on_row: Callable[[Row], None]
    ):
        self._log, self._threads, self._on_row = log, threads, on_row
        self._tells = True

    def take(self, row: Row) -> None:
        """Take the next row."""
        if self._log is None:
            return
        if not row["step"] and self._threads:
            row["threads"] = int(self._threads)
        self._log.write(row)
        if self._tells:
            # an error of it is told, and the rows on the way out of that are not
            self._tells = False
            self._on_row(row)
            self._tells = True


class Saving:
    """Saves what a trainer holds, where it has gone on since it was saved last.

    Args:
        trainer:   to save
        root:      of the run's checkpoints
        state:     of each of them, but for the counters
        keep:      checkpoints that are kept
        is_async:  whether steps go on beside what is written
    """

    def __init__(self, trainer: Trainer, root: Path, state: dict, keep: int, *, is_async: bool):
        self._trainer, self._root, self._state, self._keep = trainer, root, state, keep
        group = trainer.placements.job.group
        self.saver = checkpoint.Saver(group=group if is_async else None)
        self._write = self.saver.save if is_async else partial(checkpoint.save, group=group)
        self._saved = trainer.step
        self.is_finished = False
        """Whether the last step of the run is saved."""

    def save(self, rows: Rows) -> None:
        """Save, or begin to; a step that was not finite raises before it can be saved."""
        rows.settle()
        trainer = self._trainer
        if trainer.step <= self._saved:
            return
        self._write(
            self._root,
            trainer.step,
            trainer.tensors(),
            {**self._state, "counters": trainer.counters()},
            keep=self._keep,
            read=trainer.read,
            # the loss of the last step says nothing of what its update made
            finite=("model", "ema"),
        )
        self._saved = trainer.step

    def end(self, rows: Rows) -> None:
        """Save, and wait until it is done."""
        self.save(rows)
        self.saver.wait()
        self.is_finished = self._saved >= self._trainer.total_steps


def take_steps(
    trainer: Trainer, saving: Saving, save_every: int, take: Callable[[Row], None]
) -> None:
    """Train to the end; save there, every so many steps, and where it ends early.

    Args:
        trainer:     at any step
        saving:      of it
        save_every:  steps; 0 saves at the end alone
        take:        called with each row, when the next step was launched
    Raises:
        Stopped: a signal asked this process or another of the job to end; all of them save.
    """
    job = trainer.placements.job
    with StopSignals(twice=launched()) as stop, Rows(take) as rows, saving.saver:

        def goes_on() -> bool:
            job.asked = stop.asked is not None
            # several processes end behind the same step: where all know that one was asked
            ends = job.asked if job.group is None else rows.is_asked
            return trainer.step < trainer.total_steps and not ends

        try:
            while goes_on():
                rows.add(trainer.launch(trainer.next_block()))
                saving.saver.check()
                if save_every and not trainer.step % save_every:
                    saving.save(rows)
        except BaseException as error:
            # a step that was cut short has moved nothing, unless its backward had; whoever goes on
            # from before a loss that is not finite comes to it again; and of several processes one
            # cannot save what others hold
            early = trainer.config.optimizer_in_backward
            if not early and not isinstance(error, FloatingPointError) and job.group is None:
                _save_at_last(partial(saving.end, rows))
            raise
        saving.end(rows)
        if trainer.step < trainer.total_steps:
            raise Stopped(stop.asked or signal.SIGTERM, trainer.step, trainer.total_steps)


def _save_at_last(save: Callable[[], None]) -> None:
    """Save on the way out of an error, which is told whether or not this comes off."""
    try:
        save()
    except Exception as error:
        warnings.warn(f"steps since the last checkpoint are lost: {error}", stacklevel=2)
