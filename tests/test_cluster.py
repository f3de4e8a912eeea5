"""The files for clusters: each is run as far as a machine without one can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dbkernels.training.run import load_run

CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"
SMALL = ["--steps", "2", "--batch-size", "4", "--depth", "4"]
# it starts each process with its numbers, as Slurm's own does, and ends with the highest code
SRUN = """#!/usr/bin/env bash
worst=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" || code=$?
    worst=$((${code:-0} > worst ? code : worst))
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >>"$SAID"; fi
"""
PYTHON = """#!/usr/bin/env bash
echo "$RANK of $WORLD_SIZE on $LOCAL_RANK at $MASTER_ADDR:$MASTER_PORT: $*" >>"$SAID"
exit "$CODE"
"""


def environment(folder, **more):
    """Ours, with the programs of a folder before all others."""
    paths = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": paths, "CUDA_VISIBLE_DEVICES": "", **more}


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_a_script_is_one_that_bash_reads(name):
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)


def test_a_machine_trains_all_blocks_in_jobs_of_their_own_and_starts_again(tmp_path):
    run, env = tmp_path / "run", environment(tmp_path)

    def start(*flags):
        command = ["bash", CLUSTER / "torchrun.sh", run, "2", "vit", *SMALL, *flags]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    refused = start("--data", "nowhere")
    assert refused.returncode == 1 and "a block has not ended" in refused.stderr
    ended = start()
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith(f"united the blocks: {run}/checkpoints/step-00000004\n")
    assert len(load_run(run, device="cpu")[1]) == 2
    again = start()
    assert again.stdout.count("nothing to do: all 2 steps are trained already") == 2


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sh as task 1 of an array, of two processes that end with a code; what was said."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    told = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "70003", "SLURM_NTASKS": "2"}
    told |= {"SLURM_JOB_NODELIST": "node[7-8]", "SAID": str(said)}

    def slurm(code):
        said.write_text("")
        command = ["bash", CLUSTER / "slurm.sh", tmp_path / "run", "vit", "--num-blocks", "3"]
        env = environment(tmp_path, **told, CODE=str(code))
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.returncode, said.read_text().splitlines()

    return slurm


def test_slurm_gives_each_process_its_place_and_each_task_its_block(slurm, tmp_path):
    code, (first, second) = slurm(0)
    assert code == 0
    assert first.startswith("0 of 2 on 0 at node7:30003: -m dbkernels train vit --num-blocks 3")
    assert second.startswith("1 of 2 on 1 at node7:30003: -m dbkernels train vit --num-blocks 3")
    assert f"--out {tmp_path}/run --sharing copies --block 1 --shard" in first
    assert "--resume" not in first
    (tmp_path / "run/block1/checkpoints").mkdir(parents=True)
    assert slurm(0)[1][0].endswith("--requeue --resume latest")


@pytest.mark.parametrize(("code", "ends", "queued"), [(75, 0, ["requeue 70003"]), (1, 1, [])])
def test_slurm_queues_again_what_was_asked_to_end_and_nothing_else(code, ends, queued, slurm):
    done, said = slurm(code)
    assert (done, said[2:]) == (ends, queued)


def test_the_task_of_skypilot_trains_one_block():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert {"BLOCK", "RUN", "FLAGS"} <= task["envs"].keys()
    assert '--sharing copies --block "$BLOCK" --shard' in task["run"]
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
