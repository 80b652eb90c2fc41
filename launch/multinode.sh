#!/usr/bin/env bash
# Several machines over pdsh and ssh; docs/multinode.md takes you there step by step.
#
#   cp launch/hostfile.example hostfile     # and put your hosts in
#   launch/multinode.sh configs/train/1.6b.yaml
#   HOSTFILE=/etc/hosts.deepspeed launch/multinode.sh configs/train/400m.yaml steps=1000
#
# Needs on every host: ssh without a password from here (`ssh HOST true`), the same Python environment at the same path,
# and this folder, the run folder and the datasets at the same paths (a shared file system). Here: pdsh.
# Variables named NCCL_*, GLOO_*, HF_*, TORCH_* … go along; others, secrets (*TOKEN*, …) among them, do if .deepspeed_env
# has a line NAME=VALUE for them.
#
# Exit codes: 0 done, 2 a mistake (all of all hosts at once), 75 stopped with a checkpoint saved (run it again to go on),
# 1 anything else. Ctrl-C saves and stops; twice ends the workers, three times kills them.
set -euo pipefail

HOSTFILE=${HOSTFILE:-hostfile}

# After a failure: so many further starts from the newest checkpoint, without hosts that are not fit any more as long as
# so many are left.
RESTARTS=${RESTARTS:-10}
MIN_HOSTS=${MIN_HOSTS:-1}

# The interface that leads to the other hosts is found on each of them; this is for another one.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

exec lcm-ds launch --hostfile "$HOSTFILE" --max-restarts "$RESTARTS" --min-hosts "$MIN_HOSTS" "$@"
