#!/usr/bin/env bash
# One block a job, as an array of Slurm: blocks share nothing, so they may run at any time, anywhere.
# A job that is near its time limit saves, ends with 75 and is put into the queue again; it goes on
# with as many GPUs as it gets then.
#
#     sbatch --array=0-2 examples/cluster/slurm.sh RUN vit --data DATA --num-blocks 3 [flags of train]
#     dbkernels merge RUN
#SBATCH --job-name=block
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

run=$1 block=$SLURM_ARRAY_TASK_ID
shift
resume=()
if [ -d "$run/block$block/checkpoints" ]; then
    resume=(--resume latest)
fi
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# srun starts the processes itself, so its exit code is theirs; torchrun has one of its own
code=0
srun bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' - \
    python -m dbkernels train "$@" --out "$run" --sharing copies --block "$block" --shard \
    --save-every 1000 --requeue "${resume[@]}" || code=$?
if [ "$code" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
