"""Copies that run one after another, between the steps or beside them."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class CopyStream:
    """Runs copies in order; those beside the steps have a thread and a CUDA stream of their own.

    Args:
        device:  that the steps run on
        beside:  whether to run them beside the steps
    """

    def __init__(self, device: torch.device, *, beside: bool):
        self._device, self._cuda = device, device.type == "cuda"
        self._thread = ThreadPoolExecutor(1) if beside else None
        self._stream = torch.cuda.Stream(device) if beside and self._cuda else None
        self._submitted: list[Future] = []
        self._process = os.getpid()

    def submit(self, copy: Callable[[], None], *, after_steps: bool = False) -> Future | None:
        """Run a copy after those before it, and where asked, after the steps launched so far.

        Args:
            copy:         raises at a later call where it fails beside the steps
            after_steps:  whether it reads or writes what these steps do
        Returns:
            What `join` takes.
        Raises:
            ValueError: as `require_thread`.
        """
        if self._thread is None:
            copy()
            return None
        self.require_thread()
        while self._submitted and self._submitted[0].done():
            self._submitted.pop(0).result()
        launched = None
        if self._cuda and after_steps:
            launched = torch.cuda.current_stream(self._device).record_event()
        self._submitted.append(self._thread.submit(self._run, copy, launched))
        return self._submitted[-1]

    def follow(self) -> None:
        """Have the copies that follow wait for the steps launched so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _run(
        self, copy: Callable[[], None], launched: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        if not self._cuda:
            copy()
            return None
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            if launched:
                self._stream.wait_event(launched)
            copy()
            return self._stream.record_event()

    def join(self, submitted: Future | None) -> None:
        """Have the steps that follow wait for one copy."""
        done = submitted.result() if submitted else None
        if done:
            torch.cuda.current_stream(self._device).wait_event(done)

    def wait(self) -> None:
        """Return when every copy is through.

        Raises:
            ValueError: as `require_thread`.
        """
        self.require_thread()
        while self._submitted:
            self._submitted.pop(0).result()
        if self._cuda:
            (self._stream or torch.cuda.current_stream(self._device)).synchronize()

    def require_thread(self) -> None:
        """Refuse a fork of the process that has the thread.

        Raises:
            ValueError: this is one.
        """
        # in a fork it is not there, and who waits for it waits for ever
        if self._thread is not None and os.getpid() != self._process:
            raise ValueError(
                f"prefetch must be used by the process {self._process} that has its thread, "
                f"got its fork {os.getpid()}"
            )
