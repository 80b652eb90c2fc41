#!/usr/bin/env bash
# Several machines over pdsh and ssh; see docs/multinode.md for a step-by-step guide.
#
#   cp launch/hostfile.example hostfile     # and edit it
#   launch/multinode.sh configs/train/1.6b.yaml
#   HOSTFILE=/etc/hosts.deepspeed launch/multinode.sh configs/train/400m.yaml steps=1000
#
# Needs on every host: ssh without a password from here (`ssh HOST true`), the same Python environment at the same path,
# and this folder, the run folder and the datasets at the same paths (a shared file system). Here: pdsh.
# Variables named NCCL_*, GLOO_*, HF_*, TORCH_* … are sent to the workers; others, and secrets (*TOKEN*, …), only if
# .deepspeed_env has a line NAME=VALUE for them.
#
# Exit codes: 0 done, 2 an error (all errors of all hosts are listed at once), 75 stopped with a checkpoint saved (run it
# again to resume), 1 anything else. Ctrl-C saves and stops; twice ends the workers, three times kills them.
set -euo pipefail

HOSTFILE=${HOSTFILE:-hostfile}

# Restarts from the newest checkpoint after failures, without hosts that have become unfit, as long as MIN_HOSTS are left.
RESTARTS=${RESTARTS:-10}
MIN_HOSTS=${MIN_HOSTS:-1}

# The network interface to the other hosts is detected on each host; this overrides it.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

exec lcm-ds launch --hostfile "$HOSTFILE" --max-restarts "$RESTARTS" --min-hosts "$MIN_HOSTS" "$@"
