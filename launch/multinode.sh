#!/usr/bin/env bash
# Several machines over pdsh and ssh, through DeepSpeed's runner.
#
#   cp launch/hostfile.example hostfile     # and put your hosts in
#   launch/multinode.sh configs/train/1.6b.yaml
#   HOSTFILE=/etc/hosts.deepspeed launch/multinode.sh configs/train/1.6b.yaml steps=1000
#
# Needs on every host: ssh without a password from here (`ssh HOST true`), the same Python environment at the same path,
# and this folder, the run folder and the datasets at the same paths (a shared file system). Here: pdsh.
# Variables named NCCL_*, GLOO_*, HF_*, TORCH_* … go along; others can be put into .deepspeed_env, a NAME=VALUE a line.
# Secrets (*TOKEN*, *SECRET*, …) do not go along: a remote command line can be read by everyone on the host.
set -euo pipefail

HOSTFILE=${HOSTFILE:-hostfile}

# Hosts with several networks: the interface that reaches the others (`ip route get ADDRESS` names it).
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

lcm-ds doctor --hostfile "$HOSTFILE" "$@"
exec lcm-ds launch --hostfile "$HOSTFILE" "$@"
