"""Blocks that one job trains side by side: no process hears of another block's."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from several import met, together
from torch.utils._python_dispatch import TorchDispatchMode
from training.parallel.runs import RUN, WHOLE, assert_same_runs, read, train_block

from dbkernels.training.log import read_log
from dbkernels.training.merge import merge
from dbkernels.training.run import load_run, train
from dbkernels.training.trainer import Trainer


class Collectives(TorchDispatchMode):
    """Notes what processes send each other, by op and the ranks of its group."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            (group,) = (
                dist.ProcessGroup.unbox(a)
                for a in args
                if type(a) is torch.ScriptObject and "ProcessGroup" in str(a._type())
            )
            self.found.append((func.name(), dist.get_process_group_ranks(group)))
        return func(*args, **(kwargs or {}))


def train_side_by_side(config, rank, **options):
    """Train this process's block, and write what its steps have sent."""
    sent, advance = Collectives(), Trainer.advance

    def noted(trainer, block):
        with sent:
            return advance(trainer, block)

    Trainer.advance = noted
    with met(blocks=config.partition.num_blocks) as job:
        told = {"block": job.block, "data": job.data.rank, "first": job.is_first}
        train(config, RUN, device="cpu", job=job, threads=1, **options)
    Path(f"sent{rank}").write_text(json.dumps({**told, "sent": sent.found}))


def sent_by(rank):
    return json.loads(Path(f"sent{rank}").read_text())


def test_without_a_share_in_anything_they_are_the_run_of_one_process_bit_for_bit(make_copies):
    config = make_copies("dit", steps=2, label_drop=0.2)
    together(partial(train_side_by_side, config), 3, "printed")
    found = [sent_by(rank) for rank in range(3)]
    assert found == [{"block": b, "data": 0, "first": True, "sent": []} for b in range(3)]
    train_block(config, name="whole", threads=1)
    merge(RUN)
    assert_same_runs()


def test_two_processes_of_each_block_send_nothing_to_those_of_another(make_copies):
    partition = {"num_blocks": 2, "split": "1,2"}
    config = make_copies("vit", steps=3, batch_size=4, lr=1e-3, shard=True, partition=partition)
    together(partial(train_side_by_side, config), 4, "printed")
    for rank in range(4):
        told = sent_by(rank)
        block, data = divmod(rank, 2)
        assert (told["block"], told["data"], told["first"]) == (block, data, not data)
        ops = {op for op, _ in told["sent"]}
        # weights are gathered, gradients are averaged, and the loss, its norm and a signal told
        assert ops >= {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allreduce_"}
        assert [ranks for _, ranks in told["sent"]] == len(told["sent"]) * [
            [2 * block, 2 * block + 1]
        ]
        assert sum(op == "c10d::allreduce_" for op, _ in told["sent"]) == 2 * 3
    train_block(config, name="whole", threads=1)
    merge(RUN)
    (_, ours, state), (_, expected, _) = read(RUN), read(WHOLE)
    assert state["conditions"]["processes"] == 2
    for name, tensor in expected["optimizer"].items():
        torch.testing.assert_close(ours["optimizer"][name], tensor, rtol=0, atol=3e-8, msg=name)
    for row, expected_row in zip(*(read_log(d / "log.jsonl") for d in (RUN, WHOLE)), strict=True):
        assert row == pytest.approx(expected_row, rel=2e-6)
    # what two have trained one goes on with, and says what that may mean
    with pytest.warns(UserWarning, match="processes was 2 and is 1: bits from here on may be othe"):
        train_block(config, name="run", resume="latest")
    assert load_run(RUN, device="cpu")[0] == config


def test_a_gradient_is_sent_once_in_a_step_however_many_micro_batches_make_it(make_copies):
    config = make_copies("vit", steps=1, accumulate=2, partition={"num_blocks": 1})
    together(partial(train_side_by_side, config), 2, "printed")
    _, tensors, _ = read(RUN / "block0")
    # and the loss and the norm
    assert len(sent_by(0)["sent"]) == len(tensors["ema"]) + 2


def test_what_is_sent_across_blocks_is_seen(tmp_path):
    def work(rank):
        sent = Collectives()
        with met(blocks=2) as job, sent:
            dist.all_reduce(torch.ones(1), group=job.group)
            dist.all_reduce(torch.ones(1))
        if rank == 3:
            (tmp_path / "sent").write_text(json.dumps(sent.found))

    together(work, 4, tmp_path)
    (_, own), (_, every) = json.loads((tmp_path / "sent").read_text())
    assert (own, every) == ([2, 3], [0, 1, 2, 3])
