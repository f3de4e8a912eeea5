"""A run that is asked to end finishes its step, saves and ends."""

import signal
import threading

# what a scheduler, a terminal or a person sends
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Stopped(Exception):
    """A run ended before its last step, because a signal asked for it; it has saved.

    Args:
        signal:  that asked
        step:    the run's steps that are done
        steps:   of the whole run
    """

    def __init__(self, signal: signal.Signals, step: int, steps: int):
        super().__init__(
            f"{signal.name} ended the run at step {step} of {steps}: --resume latest goes on"
        )
        self.signal = signal


class StopSignals:
    """Takes note of a signal that asks a run to end; a second one does what it did before.

    As a context, in the main thread: Python hands signals to no other.

    Args:
        twice:  whether a second SIGTERM is the same request. Where a scheduler sends it to all of a
                job, a launcher that got it sends it to its processes once more, and kills those
                that stay for long
    """

    asked: signal.Signals | None = None

    def __init__(self, *, twice: bool = False):
        self._twice = twice

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._note) for number in ASKING if main}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.asked = signal.Signals(number)
        for each, handler in self._before.items():
            if not (self._twice and each == signal.SIGTERM):
                signal.signal(each, handler)
