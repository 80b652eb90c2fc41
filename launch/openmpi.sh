#!/usr/bin/env bash
# Open MPI's mpirun, on this machine or on the hosts that mpirun gets from its scheduler.
#
#   PROCESSES=2 launch/openmpi.sh configs/train/quickstart.yaml
#   PROCESSES=16 MASTER_ADDR=worker-0 launch/openmpi.sh configs/train/1.6b.yaml    # several hosts
#
# On several hosts MASTER_ADDR has to be the host of rank 0. Set further options by mpirun's own variables, e.g.
#   export OMPI_MCA_rmaps_base_oversubscribe=1                                     # more processes than cores
#   export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1               # as root, in a container
set -euo pipefail

PROCESSES=${PROCESSES:-$( (nvidia-smi --list-gpus 2>/dev/null || echo cpu) | wc -l)}

exec lcm-ds launch --openmpi "$PROCESSES" "$@"
