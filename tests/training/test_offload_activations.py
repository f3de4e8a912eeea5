"""What the backward needs comes back from the host bit by bit, and the device is free meanwhile."""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from training.races import Machine, address
from training.tiny import CONFIGS, CPU, IN_BACKWARD, PREFETCH, PROCESSES, make_data, make_trainer

from dbkernels.models import FAMILIES
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.philox import Draw
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.offload import activations
from dbkernels.training.offload.activations import AHEAD, SMALLEST, ActivationOffload, Copies

HOST = torch.device("cpu")
CUDA = torch.device("cuda")
EVERY = [
    *((family, recompute) for family in ("vit", "dit", "ar") for recompute in POLICIES),
    *((family, "none") for family in ("mmdit", "mdm", "huginn")),
]
N = SMALLEST // 4  # float32 numbers of a storage that is moved


class Counted(Copies):
    """Copies that tell of themselves."""

    def __init__(self, device=HOST, room=None):
        super().__init__(device, room or (lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)))
        self.stored, self.loaded, self.rooms = [], [], 0
        inner = self._room

        def counted_room(nbytes):
            self.rooms += 1
            return inner(nbytes)

        self._room = counted_room

    def store(self, flat):
        stored = super().store(flat)
        self.stored.append(stored[0].data_ptr())
        return stored

    def load(self, home):
        self.loaded.append(home.data_ptr())
        return super().load(home)


@pytest.fixture
def every_size(monkeypatch):
    """Storages of the tiny models are moved too."""
    monkeypatch.setattr(activations, "SMALLEST", 16)


def offload(model=None):
    found = ActivationOffload(model or nn.Module(), HOST)
    found.copies = Counted()
    return found


class Read(torch.autograd.Function):
    """Keeps tensors; its backward hands them to `take`, and its gradient is that of the first."""

    @staticmethod
    def forward(ctx, take, x, *kept):
        ctx.take = take
        ctx.save_for_backward(*kept)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.take(*ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()
        return None, dy, *(None,) * (len(ctx.needs_input_grad) - 2)


def leaf():
    return torch.zeros(1, dtype=torch.float32, requires_grad=True)


# bits


def gradients(family, recompute, autocast, around):
    torch.manual_seed(1)
    model = FAMILIES[family].model(replace(CONFIGS[family], recompute=recompute))
    blocks = DiffusionBlocks(model, 1, process=PROCESSES[family])
    batch = make_data(family=family).batch(torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), around(blocks, batch):
        loss = blocks.loss(blocks[0], batch, Draw(3, 0))
    loss.backward()
    return [loss.detach(), *(p.grad for p in blocks.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(("family", "recompute"), EVERY)
def test_every_gradient_has_the_bits_that_it_has_without(family, recompute, autocast, every_size):
    moved, keys = [], set()

    def around(blocks, batch):
        moved.append(offload(blocks))
        return moved[0].around(batch.values())

    def look(tensor):
        keys.add(tensor.untyped_storage()._cdata)
        alive.append(tensor)
        return tensor

    found = gradients(family, recompute, autocast, around)
    assert all(map(torch.equal, found, gradients(family, recompute, autocast, nothing)))
    alive: list = []
    gradients(family, recompute, autocast, lambda *_: saved_tensors_hooks(look, lambda t: t))
    copies = moved[0].copies
    # storages, not tensors, and not those of parameters
    assert 5 < len(copies.stored) < len(keys)
    assert len(copies.loaded) == len(set(copies.loaded)) < len(copies.stored)
    # nothing of it is left but buffers
    assert sorted(copies.stored) == sorted(h.data_ptr() for v in copies._unused.values() for h in v)


def nothing(*_):
    return nullcontext()


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate": 2},
        {"autocast": True, "ema": 0.9},
        {**CPU, "steps_per_swap": 2},
        PREFETCH,
        IN_BACKWARD,
    ],
    ids=str,
)
def test_a_run_has_the_bits_that_it_has_without(settings, every_size):
    trainers = [make_trainer(offload_activations=on, **settings) for on in (False, True)]
    trainers[1].activations.copies = Counted()
    rows = [[], []]
    for trainer, told in zip(trainers, rows, strict=True):
        trainer.run(told.append)
    assert rows[0] == rows[1]
    found = [
        [t for group in trainer.tensors().values() for t in group.values()] for trainer in trainers
    ]
    assert all(map(torch.equal, *found))
    copies = trainers[1].activations.copies
    # the buffers of the first step of each block serve the others
    assert copies.rooms < len(copies.stored) / 3 and copies.loaded


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    x, weight = torch.randn(8, N), torch.randn(N, requires_grad=True)
    moved = offload()
    with moved.around([]):
        y = (x * weight).sin().cos().exp().tanh().sin().cos()
    (first,), (second,) = (
        torch.autograd.grad(y.sum(), weight, retain_graph=kept) for kept in (True, False)
    )
    (plain,) = torch.autograd.grad((x * weight).sin().cos().exp().tanh().sin().cos().sum(), weight)
    assert torch.equal(first, plain) and torch.equal(second, plain)
    assert len(moved.copies.loaded) == len(moved.copies.stored) - AHEAD


# what is moved


def test_what_lives_anyway_stays_and_so_does_what_is_small():
    model = nn.Linear(N, 1, bias=False)
    model.register_buffer("table", torch.zeros(N))
    batch = torch.zeros(2 * N)
    tensors = [model.weight.view(-1)[4:], model.table, batch[N:], torch.zeros(N - 4)]
    got, moved = [], offload(model)
    with moved.around([batch]):
        x = Read.apply(lambda *kept: got.extend(kept), leaf(), *tensors)
    assert not moved.copies.stored
    x.sum().backward()
    assert [t.data_ptr() for t in got] == [t.data_ptr() for t in tensors]
    with moved.around([]):
        x = Read.apply(lambda *kept: None, leaf(), batch[N:], torch.zeros(N))
    assert len(moved.copies.stored) == 2


@pytest.mark.parametrize("fetched", [False, True])
def test_tensors_of_one_storage_come_back_as_views_of_one(fetched):
    storage = torch.arange(4 * N).float()
    tensors = [
        storage[3 : 3 + N].view(2, N // 2),
        storage.view(torch.bfloat16)[5 : 5 + N],
        storage.as_strided((4, 8), (1, 9), 7),
        storage.view(torch.uint8)[1:9],
    ]
    expected = [tensor.clone() for tensor in tensors]
    told = [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in tensors]
    got, moved, x = [], offload(), leaf()
    with moved.around([]):
        x = Read.apply(lambda *kept: got.extend(kept), x, *tensors[:2])
        x = Read.apply(lambda *kept: got.extend(kept), x, *tensors[2:])
        del tensors
        gone = StorageWeakRef(storage.untyped_storage())
        storage = None
        for _ in range(AHEAD + 1 if fetched else 0):
            x = Read.apply(lambda *kept: None, x, torch.zeros(4 * N))
    assert gone.expired() == fetched and len(moved.copies.stored) == 1 + 4 * fetched
    x.sum().backward()
    got = [*got[2:], *got[:2]]
    assert [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in got] == told
    assert all(map(torch.equal, got, expected))
    assert len({t.untyped_storage().data_ptr() for t in got}) == 1
    assert len(moved.copies.loaded) == 2 * fetched
    used = StorageWeakRef(got[0].untyped_storage())
    got.clear()
    assert used.expired()


def test_a_storage_that_is_no_number_of_words_stays():
    # its last bytes are none of the first tensor's, whose numbers it is counted in
    storage, got, moved = torch.arange(4 * N + 3).to(torch.uint8), [], offload()
    with moved.around([]):
        x = Read.apply(
            lambda *kept: got.extend(kept), leaf(), storage[:-3].view(torch.int32), storage
        )
    x.sum().backward()
    assert torch.equal(got[1], storage) and not moved.copies.stored


def test_a_new_storage_at_an_old_address_is_another():
    got, moved, x = [], offload(), leaf()
    with moved.around([]):
        for number in range(20):
            x = Read.apply(lambda kept: got.append(kept[0].item()), x, torch.full((N,), number))
    x.sum().backward()
    assert got == list(range(19, -1, -1))


# the device meanwhile


def stack(moved, layers, on_device, take=lambda kept: None, size=N):
    """Layers that each keep a storage of their own, of which those on the device are told."""
    x, kept = leaf(), []
    with moved.around([]):
        for _ in range(layers):
            tensor = torch.zeros(size)
            kept.append(StorageWeakRef(tensor.untyped_storage()))
            x = Read.apply(take, x, tensor)
            del tensor
            on_device.append(sum(not ref.expired() for ref in kept))
    return x


def test_the_forward_leaves_a_bounded_share_on_the_device():
    on_device = []
    stack(offload(), 8, on_device)
    assert on_device == [1, 2, 3, *[AHEAD] * 5]


def test_a_large_storage_makes_room_for_others_of_its_size_alone():
    moved, x = offload(), leaf()
    sizes = [N] * 6 + [8 * N] + [N] * 6
    with moved.around([]):
        kept = []
        for size in sizes:
            tensor = torch.zeros(size)
            kept.append(StorageWeakRef(tensor.untyped_storage()))
            x = Read.apply(lambda kept: None, x, tensor)
            del tensor
    there = [not ref.expired() for ref in kept]
    # (8 + 3 + 6) N are not more than 3 times 8 N
    assert there == [False] * 3 + [True] * 10


def test_the_backward_fetches_the_next_storages_ahead_and_no_more():
    moved, fetched = offload(), []
    x = stack(moved, 8, [], take=lambda kept: fetched.append(len(moved.copies.loaded)))
    stored = moved.copies.stored.copy()
    x.sum().backward()
    # the last ones are on the device still; then one for each that was used
    assert fetched == [1, 2, 3, 4, 5, 5, 5, 5]
    assert moved.copies.loaded == stored[4::-1]


def test_what_a_backward_does_not_come_to_is_freed():
    moved = offload()
    x = stack(moved, 8, [])
    homes = sorted(moved.copies.stored)
    del x
    assert sorted(h.data_ptr() for v in moved.copies._unused.values() for h in v) == homes
    assert not moved._known
    # what comes after is as if it had not been
    fetched = []
    stack(moved, 8, [], take=lambda kept: fetched.append(len(moved.copies.loaded))).sum().backward()
    assert fetched == [1, 2, 3, 4, 5, 5, 5, 5] and moved.copies.rooms == 8
    for _ in range(3):
        stack(moved, 8, [])
    assert len(moved._waiting) == 8


@pytest.mark.parametrize("size", [4, N])
def test_a_graph_that_nobody_holds_is_gone_at_once(size):
    weight = torch.zeros(size, requires_grad=True)
    gc.disable()
    with offload().around([]):
        outputs = [(weight + 1).exp().sqrt() for _ in range(2)]
    gone = [StorageWeakRef(output.untyped_storage()) for output in outputs]
    del outputs
    gc.enable()
    assert all(ref.expired() for ref in gone)


class Joined(Counted):
    """Copies that say which of them somebody has waited for."""

    def __init__(self):
        super().__init__()
        self.begun, self.joined = [], []

    def _copy(self, source, to):
        super()._copy(source, to)
        self.begun.append(len(self.begun))
        return self.begun[-1]

    def join(self, copied):
        if copied is not None:
            self.joined.append(copied)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_memory_is_free_behind_the_copies_from_and_to_it(used):
    moved = offload()
    copies = moved.copies = Joined()

    def take(kept):
        if len(copies.begun) > 8 + used:
            raise KeyboardInterrupt

    x = stack(moved, 8, [], take)
    assert copies.joined == [*range(8 - AHEAD)]
    if used:
        with pytest.raises(KeyboardInterrupt):
            x.sum().backward()
    del x
    assert sorted(copies.joined) == copies.begun == [*range(8 + (used and used + 1))]


# what was written over


def double(tensor):
    with torch.no_grad():
        tensor.mul_(2)


@pytest.mark.parametrize("layers", [0, AHEAD])
@pytest.mark.parametrize("size", [N, 4])
def test_what_was_written_over_after_it_was_kept_is_refused(size, layers):
    moved, x, kept = offload(), leaf(), torch.zeros(size)
    with moved.around([]):
        x = Read.apply(lambda *_: None, x, kept)
        double(kept)
        for _ in range(layers):
            x = Read.apply(lambda *_: None, x, torch.zeros(N))
    with pytest.raises(RuntimeError, match="must stay as it was, got one that was written over"):
        x.sum().backward()


@pytest.mark.parametrize("layers", [0, AHEAD])
def test_who_reads_what_a_backward_has_written_over_is_refused(layers):
    moved, x, kept = offload(), leaf(), torch.zeros(N)
    with moved.around([]):
        x = Read.apply(lambda *_: None, x, kept)
        x = Read.apply(torch.autograd.graph.increment_version, x, kept)
        del kept
        for _ in range(layers):
            x = Read.apply(lambda *_: None, x, torch.zeros(N))
    with pytest.raises(RuntimeError, match="must stay as it was, got one that was written over"):
        x.sum().backward()


# other hooks


def test_hooks_around_are_asked_for_what_is_on_the_device():
    held, most = weakref.WeakSet(), []

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            held.add(self)
            most.append(sum(each.tensor.nbytes for each in held))

    moved = offload()
    with saved_tensors_hooks(Held, lambda each: each.tensor):
        x = stack(moved, 8, [])
        with moved.around([]):
            x = Read.apply(lambda *_: None, x, torch.zeros(2))
    assert len(held) == AHEAD + 1 and max(most) == (AHEAD + 1) * SMALLEST
    # the hooks of then are asked, also in a backward among others
    with saved_tensors_hooks(nn.Identity(), nn.Identity()), moved.around([]):
        x.sum().backward()
    assert not held and max(most) == (AHEAD + 1) * SMALLEST


# a GPU's streams


class Reused(Machine):
    """Whoever makes a tensor writes to memory that was another's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        before = {address(t) for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
        if made := [t for t in made if address(t) not in before]:
            self._run([], made)
        return outputs


@pytest.fixture
def races(monkeypatch, every_size):
    """Races of a run whose copies go as on a GPU, where something is changed."""
    machine = Reused()
    machine.install(monkeypatch)

    class Watched(Copies):
        def store(self, flat):
            machine._device_memory.add(flat.untyped_storage().data_ptr())
            return super().store(flat)

    def room(nbytes):
        home = torch.empty(nbytes, dtype=torch.uint8)
        machine._device_memory.discard(home.data_ptr())
        machine.watch_host(home)
        return home

    def run(deaf):
        trainer = make_trainer("vit", 1, offload_activations=True)
        copies = trainer.activations.copies = Watched(CUDA, room)
        copies._device = HOST
        machine.deaf = deaf
        with machine:
            for _ in range(3):
                trainer.launch(trainer.next_block())
        return machine.races

    return run


def test_no_copy_meets_a_step_that_reads_or_writes_the_same_memory(races):
    assert races(()) == []


@pytest.mark.parametrize("wait", ["wait_event", "wait_stream"])
def test_a_wait_that_is_forgotten_is_a_race(races, wait):
    assert races((wait,))


@pytest.mark.parametrize("seen", [lambda w: w, lambda w: w.T], ids=["itself", "a view"])
def test_a_weight_that_was_gathered_within_stays(seen):
    # FSDP2 makes such parameters in the forward, and lets go of their storage by itself
    moved, x = offload(), torch.ones(N, requires_grad=True)
    with moved.around([]):
        gathered, other = nn.Parameter(torch.ones(1, N)), torch.full((N,), 2.0)
        out = Read.apply(lambda *kept: None, x, seen(gathered), other)
    assert len(moved.copies.stored) == 1
    out.sum().backward()
