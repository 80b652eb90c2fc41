#!/usr/bin/env bash
# One machine: one process per device.
#
#   launch/local.sh configs/train/quickstart.yaml steps=200
#   DEVICES=2 launch/local.sh configs/train/quickstart.yaml
#
# Exit codes: 0 done, 2 an error in the config or the input, 75 stopped with a checkpoint saved (run it again to
# resume), 1 anything else. Ctrl-C saves and stops; Ctrl-C twice stops at once.
set -euo pipefail

# All GPUs that nvidia-smi lists; one process on a machine without GPUs.
DEVICES=${DEVICES:-$( (nvidia-smi --list-gpus 2>/dev/null || echo cpu) | wc -l)}

exec lcm-ds launch --local "$DEVICES" "$@"
