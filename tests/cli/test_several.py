"""Runs of the command line in several processes: how they end, and how they go on."""

import os
import resource
import signal
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from cli.runs import SIZES, refused, rows_of, until
from several import Launched

from dbkernels.cli.main import main
from dbkernels.training import checkpoint, run
from dbkernels.training.log import LOG, RunLog, read_log
from dbkernels.training.parallel.gradients import SharedGradients
from dbkernels.training.parallel.placement import here
from dbkernels.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
FLAGS = ["--data=data.npz", *SIZES, "--steps=6", "--threads=1", "--num-blocks=2", "--ema=0.9"]
FLAGS += ["--sharing=copies", "--lr=1e-3"]
SIDE_BY_SIDE = ["train", "vit", *FLAGS]
BLOCK0, BLOCK1 = ([*SIDE_BY_SIDE, f"--block={index}", "--shard"] for index in range(2))
printed = map("printed{}".format, count())


@pytest.fixture(autouse=True)
def place(cli):
    """In a directory with data."""


def launch(line, *more, out="run", world=2, before=lambda rank: None):
    def work(rank):
        before(rank)
        main([*line, f"--out={out}", *more])

    return Launched(work, world, next(printed))


def ended(*job, **told):
    return launch(*job, **told).ended()


def succeeded(*job, **told):
    """What a job has printed whose processes all did what they were to do."""
    found = ended(*job, **told)
    assert [each.code for each in found] == [0] * len(found), found
    return found


def errors(each):
    return [line for line in each.err.splitlines() if line.startswith("error: ")]


def steps_in(directory):
    """Of its checkpoints, each of which is whole; and nothing else lies there."""
    found = sorted(Path(directory, "checkpoints").iterdir())
    for path in found:
        checkpoint.load(path)
    return [int(path.name.removeprefix("step-")) for path in found]


def tensors_in(directory):
    tensors, _ = checkpoint.load(checkpoint.latest(Path(directory, "checkpoints")))
    return {(group, name): t for group, named in tensors.items() for name, t in named.items()}


def assert_same_bits(directory, other):
    ours, expected = tensors_in(directory), tensors_in(other)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())
    assert Path(directory, LOG).read_bytes() == Path(other, LOG).read_bytes()


def assert_close(directory, other):
    """Rows of the same samples, whoever has read them."""
    ours, expected = (read_log(Path(each, LOG)) for each in (directory, other))
    assert len(ours) == len(expected) == 6
    for row, expected_row in zip(ours, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4)


def at_step(number, action):
    """Do something in a process when its trainer launches a step."""
    inner = Trainer.advance

    def advance(trainer, block):
        if trainer.step == number:
            action(trainer)
        return inner(trainer, block)

    Trainer.advance = advance


def asked(ranks, rank):
    """Has a scheduler's signal come, and that of the launcher which got it too."""
    if rank in ranks:
        at_step(2, lambda _: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])


# a run that is asked to end


@pytest.mark.parametrize(
    ("ranks", "flags", "code"),
    [
        ((0, 1), [], 143),
        ((1,), ["--save-every=1"], 143),
        ((1,), ["--requeue", "--save-every=4", "--save-async"], os.EX_TEMPFAIL),
    ],
    ids=str,
)
def test_whoever_is_asked_all_save_the_same_step_end_and_go_on_to_the_same_bits(ranks, flags, code):
    first, second = ended(BLOCK0, *flags, before=partial(asked, ranks))
    assert [first.code, second.code] == [code, code]
    (warning,) = [line for line in first.err.splitlines() if line.startswith("warning: ")]
    assert "warning: SIGTERM ended the run at step" in warning and "--resume latest" in warning
    assert (second.out, second.err) == ("", "")
    newest = steps_in("run/block0")[-1]
    # the step that was launched meanwhile is the last one
    assert newest == len(read_log(Path("run/block0", LOG))) and 2 < newest < 6
    told, silent = succeeded(BLOCK0, *flags, "--resume=latest")
    assert told.out.startswith(f"trained {6 - newest} steps of block 0: run/block0\n")
    assert (silent.out, silent.err) == ("", "")
    succeeded(BLOCK0, out="whole")
    assert_same_bits("run/block0", "whole/block0")


def children_of(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_torchrun_and_its_processes_may_all_be_told_at_once():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher += ["-m", "dbkernels"]
    line = [*BLOCK0, "--out=run", "--steps=100000"]
    log = Path("run/block0", LOG)
    with (
        Path("printed").open("w") as out,
        subprocess.Popen(
            [sys.executable, *launcher, *line], env=environment, stdout=out, stderr=out
        ) as job,
    ):
        until(lambda: job.poll() is not None or (log.exists() and len(read_log(log)) > 2), 120)
        text = Path("printed").read_text()
        assert job.poll() is None, text
        processes = children_of(job.pid)
        for pid in (job.pid, *processes):
            os.kill(pid, signal.SIGTERM)
        job.wait(60)
    assert len(processes) == 2
    text = Path("printed").read_text()
    assert text.count("SIGTERM ended the run at step") == 1, text
    assert steps_in("run/block0") == [len(read_log(log))]


# a process that fails


def of_loss(trainer):
    inner = trainer._accumulate
    trainer._accumulate = lambda *given: inner(*given) * torch.nan


def of_gradient(trainer):
    inner = SharedGradients.clip

    def clip(shared, parameters, most):
        here(parameters[0].grad).fill_(torch.inf)
        return inner(shared, parameters, most)

    SharedGradients.clip = clip


@pytest.mark.parametrize("spoil", [of_loss, of_gradient])
def test_a_number_that_is_not_finite_on_one_stops_all_of_its_job_and_no_other_job(spoil):
    other = launch(BLOCK1)
    found = ended(BLOCK0, "--save-every=2", before=lambda rank: rank and at_step(3, spoil))
    assert [each.code for each in found] == [1, 1]
    told = {line for each in found for line in errors(each)}
    (line,) = told
    assert line.startswith("error: the loss must be finite, got loss ")
    assert "in block 0 at its step 3 with" in line and line.endswith("nothing was updated")
    assert all("Traceback" not in each.err for each in found)
    assert steps_in("run/block0") == [2]
    assert len(read_log(Path("run/block0", LOG))) == 3
    assert [each.code for each in other.ended()] == [0, 0]
    assert steps_in("run/block1") == [6]


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_the_job_and_one_or_two_go_on_with_the_same_samples():
    found = ended(BLOCK0, "--save-every=2", before=lambda rank: rank and at_step(3, die))
    assert [each.code for each in found] == [1, -signal.SIGKILL]
    assert steps_in("run/block0") == [2]
    main([*BLOCK0, "--out=whole"])
    # one goes on, and is asked to end; then two do, who need not share parameters out
    (alone,) = ended(
        BLOCK0,
        "--resume=latest",
        world=1,
        before=lambda rank: at_step(3, lambda _: os.kill(os.getpid(), signal.SIGTERM)),
    )
    assert alone.code == 143
    assert "processes was 2 and is 1: bits from here on may be others" in alone.err
    between = steps_in("run/block0")[-1]
    assert 3 < between < 6
    replicas = [word for word in BLOCK0 if word != "--shard"]
    first, second = succeeded(replicas, "--resume=latest")
    assert "processes was 1 and is 2" in first.err and not second.err
    assert_close("run/block0", "whole/block0")


def little_room(_):
    until(Path("run/block0/checkpoints/step-00000002").exists)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))


@pytest.mark.parametrize("flags", [[], ["--save-async"]], ids=str)
def test_a_disk_that_is_full_for_one_is_an_error_of_all_and_the_last_checkpoint_stays(flags):
    found = ended(
        BLOCK0, "--save-every=2", *flags, before=lambda rank: rank and at_step(3, little_room)
    )
    assert [each.code for each in found] == [1, 1]
    for each in found:
        assert errors(each)[-1].startswith(
            "error: rank 1: cannot write checkpoint run/block0/check"
        )
        assert "File too large" in errors(each)[-1]
    assert steps_in("run/block0") == [2]
    succeeded(BLOCK0, "--resume=latest")
    succeeded(BLOCK0, out="whole")
    assert_same_bits("run/block0", "whole/block0")


def test_a_block_has_one_writer_and_another_block_another():
    log = RunLog(Path("run/block0"))
    for each in ended(BLOCK0):
        assert each.code == 1
        assert errors(each) == [
            "error: rank 0: run/block0 must have one writer, got another that goes on"
        ]
    succeeded(BLOCK1)
    log.close()
    succeeded(BLOCK0)


# blocks side by side, and as one run


def test_blocks_side_by_side_are_merged_evaluated_and_go_on(cli):
    succeeded(SIDE_BY_SIDE, "--decay-on=all", "--steps=5")
    # with what was said the first time
    for block, each in enumerate(succeeded(SIDE_BY_SIDE, "--resume=latest")):
        assert each.out == (
            f"trained 1 steps of block {block}: run/block{block}\n"
            "dbkernels merge run unites the blocks when all are trained\n"
        )
    assert refused(
        cli("evaluate run/block1"), "run/block1 must hold all blocks of a run, got block1"
    )
    assert refused(cli("merge elsewhere"), "elsewhere must hold block0, block1, ... as `train --b")
    united = cli("merge run")
    assert united.out == "united the blocks: run/checkpoints/step-00000012\n"
    cli(" ".join([*SIDE_BY_SIDE, "--decay-on=all", "--out=whole"]))
    assert_same_bits("run", "whole")
    (ours,), (expected,) = (
        rows_of(cli(f"evaluate {each} --device cpu --levels 2 --json")) for each in ("run", "whole")
    )
    assert ours | {"run": "whole"} == expected
    for each in succeeded(SIDE_BY_SIDE, "--resume=latest", "--steps=7"):
        assert each.out.startswith("trained 1 steps of block")
    assert cli("merge run").out == "united the blocks: run/checkpoints/step-00000014\n"


def test_the_network_that_they_start_from_is_kept_by_one_of_them_and_they_go_on_with_it():
    main(["train", "vit", *FLAGS[:-2], "--num-blocks=1", "--sharing=joint", "--out=source"])

    def before(rank):
        inner = run.keep_trained

        def keep(*given):
            Path(f"kept{rank}").touch()
            inner(*given)

        run.keep_trained = keep

    line = [*BLOCK0[:-1], "--distill=0.5"]
    succeeded(line, "--from=source", out="whole", before=before)
    assert Path("kept0").exists() and not Path("kept1").exists()
    ended(line, "--from=source", before=partial(asked, (0,)))
    Path("source").rename("elsewhere")
    succeeded(line, "--from=source", "--resume=latest")
    assert_same_bits("run/block0", "whole/block0")


def test_the_room_that_a_checkpoint_needs_is_that_of_all_of_it():
    def before(rank):
        inner = checkpoint.check_root

        def check(root, nbytes):
            Path("room").write_text(str(nbytes))
            inner(root, nbytes)

        checkpoint.check_root = check

    for line in (BLOCK0, BLOCK0[:-1]):
        succeeded(line, out=f"run{len(line)}", before=before)
        tensors = tensors_in(f"run{len(line)}/block0").values()
        assert int(Path("room").read_text()) == sum(tensor.nbytes for tensor in tensors)


def test_processes_that_do_not_fit_are_refused():
    for each in ended(SIDE_BY_SIDE, world=3):
        assert each.code == 1
        (line,) = errors(each)
        assert "the number of processes must be a multiple of 2 (blocks side by side 2," in line
    for each in ended(BLOCK0, "--tensor-parallel=2", "--num-heads=1"):
        assert errors(each) == ["error: num_heads must be a multiple of the group's size 2, got 1"]
    assert not Path("run").exists()
