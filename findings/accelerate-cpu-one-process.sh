#!/bin/bash
# `accelerate launch --cpu --num_processes 2` starts one process.
#
# Versions: accelerate 1.15.0, torch 2.13.0 (CPU).
# Expected: two processes, as with --multi_gpu on GPUs, or a warning that --num_processes is not used. `--help`: "The total number of
#   processes to be launched in parallel."
# What happens: one process without RANK and WORLD_SIZE, exit code 0, and no word about it. With `--mixed_precision no
#   --num_machines 1 --num_cpu_threads_per_process 1` beside it, too.
# Seen: 1 line of a script that prints its WORLD_SIZE: "None"
# Why it matters: a multi-process training is tried on a CPU first; there it passes as two independent runs would, or as one, and
#   the first real test of its communication is on the cluster.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.4.6
echo 'import os; print("WORLD_SIZE", os.environ.get("WORLD_SIZE"))' > "$work/script.py"
export HF_HOME="$work/home"
"$work/venv/bin/accelerate" launch --cpu --num_processes 2 --mixed_precision no --num_machines 1 \
    --num_cpu_threads_per_process 1 "$work/script.py" > "$work/out" 2> "$work/err"
grep WORLD_SIZE "$work/out"
[ "$(grep -c WORLD_SIZE "$work/out")" = 1 ] && grep -q "WORLD_SIZE None" "$work/out"
! grep -qi num_processes "$work/err"
