"""A GPU's streams and events on a CPU: who reads or writes memory in which order, and who only may.

Ops run at once, so results are right whatever is forgotten. What is watched is the order that they
would have on a GPU: each stream and each thread of the host has a clock of what it knows to be done
(Lamport 1978; a vector clock). An access that does not know of an earlier one to the same memory is
a race, where one of the two writes.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


@dataclass(eq=False)
class Actor:
    """A stream, or a thread of the host."""

    name: str
    knows: dict = field(default_factory=dict)

    def learn(self, knows):
        for actor, time in knows.items():
            self.knows[actor] = max(time, self.knows.get(actor, 0))

    def act(self):
        self.knows[self] = self.knows.get(self, 0) + 1


class Machine(TorchDispatchMode):
    """Runs ops on its current stream, and keeps the races between them.

    Waits in `deaf` do nothing: some of "wait_event", "wait_stream", "event.synchronize",
    "stream.synchronize".
    """

    def __init__(self):
        super().__init__()
        self.deaf, self.races = (), []
        self.main, self.thread = Actor("host"), Actor("copying thread")
        self.host, self.stream = self.main, self.make_stream(None, name="steps")
        self._host_memory, self._device_memory = set(), set()
        self._writes, self._reads = {}, {}

    # what stands for torch.cuda

    def install(self, monkeypatch):
        machine = self

        class Event:
            def __init__(self):
                self.knows = {}

            def record(self, stream=None):
                self.knows = dict((stream or machine.stream).knows)

            def synchronize(self):
                machine.wait("event.synchronize", machine.host, self)

        self.Event = Event
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", self.make_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: machine.stream)
        monkeypatch.setattr(torch.cuda, "stream", self._on)

    def make_stream(self, device, name="copies"):
        machine = self

        class Stream(Actor):
            def record_event(self):
                event = machine.Event()
                event.record(self)
                return event

            def wait_event(self, event):
                machine.wait("wait_event", self, event)

            def wait_stream(self, stream):
                machine.wait("wait_stream", self, stream)

            def synchronize(self):
                machine.wait("stream.synchronize", machine.host, self)

        return Stream(name)

    def wait(self, how, actor, other):
        if how not in self.deaf:
            actor.learn(other.knows)

    @contextmanager
    def _on(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    # memory

    def watch_host(self, *tensors):
        """Memory of the host; all that is watched beside it is the device's."""
        self._host_memory |= {address(t) for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if func is aten.empty.memory_format and outputs.dtype == torch.uint8:
            # room that the stream's earlier ops may have used for something else
            self._device_memory.add(address(outputs))
            self._run(read=[], written=[outputs])
        elif not is_view(func):
            self._op(func, args, kwargs)
        return outputs

    def _op(self, func, args, kwargs):
        read, written = [], []
        for argument, value in zip(func._schema.arguments, args, strict=False):
            changed = argument.alias_info is not None and argument.alias_info.is_write
            tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
            (written if changed else read).extend(tensors)
        every = [*read, *written]
        at_host = [address(t) in self._host_memory for t in every]
        if not at_host:
            return
        blocking = func is aten.copy_.default and not (len(args) > 2 and args[2])
        self._run(read, written, by_host=all(at_host), waits=any(at_host) and blocking)

    def _run(self, read, written, by_host=False, waits=False):
        actor = self.host if by_host else self.stream
        actor.learn(self.host.knows)
        actor.act()
        for tensor in read:
            self._access(actor, tensor, [self._writes])
        for tensor in written:
            self._access(actor, tensor, [self._writes, self._reads])
        for tensors, book in ((read, self._reads), (written, self._writes)):
            for tensor in tensors:
                book.setdefault(address(tensor), {})[actor] = actor.knows[actor]
        if waits:
            self.host.learn(actor.knows)

    def _access(self, actor, tensor, books):
        where = address(tensor)
        if where not in self._host_memory | self._device_memory:
            return
        place = "host" if where in self._host_memory else "device"
        for other, time in (item for book in books for item in book.get(where, {}).items()):
            if actor.knows.get(other, 0) < time:
                self.races.append(f"{actor.name} against {other.name} in {place} memory")

    def read_on_host(self, tensors):
        """What a caller does with tensors that it was told are there."""
        for tensor in tensors:
            if address(tensor) in self._host_memory:
                self._run([tensor], [], by_host=True)


class Inline:
    """Stands for the thread that copies: it runs at once, and nobody knows when it is done."""

    def __init__(self, machine):
        self._machine = machine

    def submit(self, call, *args):
        machine = self._machine
        machine.thread.learn(machine.main.knows)
        before, machine.host = machine.host, machine.thread
        value = call(*args)
        machine.host = before
        return Done(machine, value, dict(machine.thread.knows))


@dataclass
class Done:
    machine: Machine
    value: object
    knows: dict

    def done(self):
        return False

    def result(self):
        self.machine.host.learn(self.knows)
        return self.value


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def is_view(func):
    returned = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)
