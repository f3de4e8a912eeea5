"""Four processes that save together: what each holds, and how each save goes on each of them."""

import errno
import json
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from training.checkpoints import names

from dbkernels import whole_file
from dbkernels.training.checkpoint import Box, Saver, Shard, save

WORLD, SPLIT = 4, 2  # processes; parts of a cut within a layer, each again in rows of two


def whole(name, *shape, dtype=torch.float32):
    """A tensor of any bits, NaN too, that each process can make."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).view(shape)


WHOLE = {
    "rows": whole("rows", 10, 3),
    "few": whole("few", 2, 5, dtype=torch.bfloat16),
    "vector": whole("vector", 7, dtype=torch.int64),
    "none": whole("none", 0, 3),
    "qkv": whole("qkv", 3 * 4, 5),
    "narrow": whole("narrow", 6, 8, dtype=torch.float16),
    "deep": whole("deep", 5, 4, 3),
    "alone": whole("alone", 4),
    "count": torch.tensor(5.0),
}


def chunk(local, boxes, rank, count):
    """Rows of a local tensor that FSDP gives a rank, and where they lie."""
    size = -(-len(local) // count)
    first = min(rank * size, len(local))
    last, found = min(first + size, len(local)), []
    for at, rows, row in boxes:
        low, high = max(row, first), min(row + rows[0], last)
        if low < high:
            found.append(Box((at[0] + low - row, *at[1:]), (high - low, *rows[1:]), low - first))
    return local[first:last], tuple(found)


def cut(tensor, dim, bands, rank, count):
    """What a rank holds of a tensor that is cut along a dim, within each of some bands of it."""
    size = tensor.shape[dim] // bands // count
    pieces, boxes, row = [], [], 0
    for band in range(bands):
        first = band * size * count + rank * size
        piece = tensor.narrow(dim, first, size)
        at = [0] * tensor.dim()
        at[dim] = first
        boxes.append(Box(tuple(at), tuple(piece.shape), row))
        pieces.append(piece)
        row += len(piece)
    return torch.cat(pieces), boxes


def rows_of(name, rank):
    tensor = WHOLE[name]
    everything = [Box((0,) * tensor.dim(), tuple(tensor.shape), 0)]
    local, boxes = chunk(tensor, everything, rank, WORLD)
    return Shard(local, tuple(tensor.shape), boxes)


def cut_rows_of(name, dim, bands, rank):
    local, boxes = cut(WHOLE[name], dim, bands, rank % SPLIT, SPLIT)
    local, boxes = chunk(local, boxes, rank // SPLIT, WORLD // SPLIT)
    return Shard(local, tuple(WHOLE[name].shape), boxes)


def held(rank):
    """What a rank holds of WHOLE; those that all hold are as the first rank has them."""
    tensors = {name: rows_of(name, rank) for name in ("rows", "few", "vector", "none")}
    tensors |= {"qkv": cut_rows_of("qkv", 0, 3, rank), "narrow": cut_rows_of("narrow", 1, 1, rank)}
    local, boxes = cut(WHOLE["deep"], 1, 1, rank % SPLIT, SPLIT)
    # the last two hold what the first two write
    tensors["deep"] = Shard(local, (5, 4, 3), tuple(boxes) if rank < SPLIT else ())
    tensors |= {"alone": WHOLE["alone"] if not rank else torch.zeros(4), "count": WHOLE["count"]}
    return {"model": tensors, "ema": {"rows": tensors["rows"]}}


def box(first, size, shape=(4,)):
    return Shard(torch.ones(size), shape, (Box((first,), (size,), 0),))


def quarters(rank, **changed):
    """One row of a vector on each rank, but for what is changed."""
    return {"model": {"w": changed.get(f"rank{rank}", box(rank, 1))}}


def fails_at(rank, at, part):
    """A save in which a call with such a name fails on one rank, as a full disk does."""

    def case(own, root, group):
        def refuse(path):
            if part in path.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path)

        real = getattr(whole_file, at)
        if own == rank:
            setattr(whole_file, at, refuse)
        try:
            save(root, 2, quarters(own), {}, group=group, keep=1)
        finally:
            setattr(whole_file, at, real)

    return case


def holds(**changed):
    return lambda rank, root, group: save(root, 2, quarters(rank, **changed), {}, group=group)


def saves_all(rank, root, group):
    save(root, 2, held(rank), {"by": rank}, group=group)
    # the second of one step takes the place of the first
    path = save(root, 2, held(rank), {"by": rank}, group=group, keep=1)
    return str(path.relative_to(root))


def not_finite(rank, root, group):
    value = torch.tensor([float("nan") if rank == 3 else 1.0])
    shard = Shard(value, (4,), (Box((rank,), (1,), 0),))
    save(root, 2, {"model": {"w": shard}}, {}, group=group, finite=["model"])


def other_steps(rank, root, group):
    save(root, 2 + (rank == 3), quarters(rank), {}, group=group)


def whole_elsewhere(rank, root, group):
    save(root, 2, {"model": {"w": torch.ones(1)} if rank == 1 else {}}, {}, group=group)


def whole_and_parts(rank, root, group):
    save(root, 2, quarters(rank, rank0=torch.ones(4)), {}, group=group)


def interrupted(rank, root, group):
    def read(tensor):
        if rank == 1:
            raise KeyboardInterrupt
        return [tensor.view(torch.uint8)]

    try:
        save(root, 2, quarters(rank), {}, group=group, read=read)
    except KeyboardInterrupt as error:
        raise RuntimeError("as it was asked") from error


def in_the_background(rank, root, group):
    """Steps go on with collectives of their own, and with other numbers."""
    with Saver(group=group) as saver:
        for step in (2, 3):
            tensors = held(rank)
            tensors["model"]["rows"] = Shard(
                w := tensors["model"]["rows"].local.clone(), (10, 3), tensors["model"]["rows"].boxes
            )
            saver.save(root, step, tensors, state := {"step": step})
            w.zero_(), state.clear()
            total = torch.tensor([float(rank)])
            for _ in range(20):
                dist.all_reduce(total, group=group)
                total /= WORLD
            saver.check()
    return float(total)


def fails_in_the_background(rank, root, group):
    """Told at the next save, on each rank, and forgotten then."""
    told = []
    with Saver(group=group) as saver:
        saver.save(root, 2, {"model": {"w": box(rank, 1 + (rank == 2))}}, {})
        for step in (3, 4):
            saver.check()
            try:
                saver.save(root, step, quarters(rank), {})
            except ValueError as error:
                told.append([step, str(error)])
    return told


def copy_fails_in_the_background(rank, root, group):
    def read(tensor):
        if rank == 1:
            raise ValueError("a file was cut short")
        return [tensor.view(torch.uint8)]

    with Saver(group=group) as saver:
        saver.save(root, 2, quarters(rank), {}, read=read)


def dies(rank, root, group):
    def read(tensor):
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return [tensor.view(torch.uint8)]

    save(root, 2, quarters(rank), {}, group=group, read=read)


CASES = {
    "saves_all": saves_all,
    "no_room_to_write": fails_at(2, "new_file", "model.2of4"),
    "no_room_to_publish": fails_at(0, "new_file", "state.json"),
    "no_flush": fails_at(1, "make_durable", "model.1of4"),
    "overlap": holds(rank1=box(0, 2)),
    "hole": holds(rank3=box(3, 0)),
    "other_shape": holds(rank1=box(1, 1, (5,))),
    "other_dtype": holds(rank1=Shard(torch.ones(1).half(), (4,), (Box((1,), (1,), 0),))),
    "not_a_tensor": holds(rank1=[1.0]),
    "not_finite": not_finite,
    "other_steps": other_steps,
    "whole_elsewhere": whole_elsewhere,
    "whole_and_parts": whole_and_parts,
    "interrupted": interrupted,
    "in_the_background": in_the_background,
    "fails_in_the_background": fails_in_the_background,
    "copy_fails_in_the_background": copy_fails_in_the_background,
    "dies": dies,
}  # fmt: skip


def work(rank, rendezvous, folder):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=limit
    )
    group = dist.group.WORLD
    for name, case in CASES.items():
        root = folder / name
        save(root, 1, quarters(rank), {}, group=group)
        try:
            outcome = ["done", case(rank, root, group)]
        except Exception as error:
            outcome = [type(error).__name__, str(error), getattr(error, "errno", None)]
        if name != "dies":
            dist.barrier()
        (folder / f"{name}.{rank}.json").write_text(json.dumps([outcome, names(root)]))
    # an interpreter that ends may find threads of the process group at work, and abort
    os._exit(0)
