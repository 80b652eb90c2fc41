#!/usr/bin/env bash
# torchrun, on one machine or on several: each worker reads its rank from the variables that torchrun sets.
#
#   launch/torchrun.sh configs/train/quickstart.yaml                                # here
#   NODES=2 NODE=0 MASTER=worker-0 launch/torchrun.sh configs/train/1.6b.yaml      # on worker-0
#   NODES=2 NODE=1 MASTER=worker-0 launch/torchrun.sh configs/train/1.6b.yaml      # on worker-1
#
# torchrun's own exit code is 1 whatever a worker's was; the worker's is in its report.
set -euo pipefail

NODES=${NODES:-1}
NODE=${NODE:-0}
MASTER=${MASTER:-127.0.0.1}
PORT=${PORT:-29500}
DEVICES=${DEVICES:-$( (nvidia-smi --list-gpus 2>/dev/null || echo cpu) | wc -l)}

exec torchrun --nnodes "$NODES" --node-rank "$NODE" --master-addr "$MASTER" --master-port "$PORT" \
    --nproc-per-node "$DEVICES" -m lcm_ds.train "$@"
