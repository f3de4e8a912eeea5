#!/usr/bin/env bash
# All blocks on one machine, each in a job of torchrun: one that dies leaves the others alone, and
# goes on where it was when this is started again.
#
#     GPUS=2 bash examples/cluster/torchrun.sh RUN BLOCKS vit --data DATA [flags of train]
#
# GPUS is how many each block has; block 0 takes the first of the machine, and so on. Without a GPU
# they are processes of the CPU.
set -euo pipefail

run=$1 blocks=$2 gpus=${GPUS:-1}
shift 2
jobs=()
for ((block = 0; block < blocks; block++)); do
    resume=()
    if [ -d "$run/block$block/checkpoints" ]; then
        resume=(--resume latest)
    fi
    own=$(seq -s, $((block * gpus)) $((block * gpus + gpus - 1)))
    # each has a rendezvous of its own, so that torchrun ends the processes of one block alone
    CUDA_VISIBLE_DEVICES=$own python -m torch.distributed.run --standalone \
        --nproc-per-node "$gpus" -m dbkernels train "$@" --out "$run" --num-blocks "$blocks" \
        --sharing copies --block "$block" --shard "${resume[@]}" &
    jobs+=($!)
done
failed=0
for job in "${jobs[@]}"; do
    wait "$job" || failed=1
done
if [ "$failed" = 1 ]; then
    echo "a block has not ended: start this again, and it goes on from its last checkpoint" >&2
    exit 1
fi
python -m dbkernels merge "$run"
