#!/bin/bash
# MPICH's mpiexec waits for the other processes if one exits with an error code, and ends them if it dies by a signal.
#
# Versions: mpich 5.0.1 from PyPI (Hydra).
# Expected: what Open MPI's mpirun does, and what the user of a distributed job wants: when one process fails, the others are
#   ended at once.
# What happens: an exit code other than 0 ends nothing: the others go on until they end by themselves. A death by SIGKILL ends them.
# Seen (rank 0 fails after a second, rank 1 sleeps for 8): seconds until mpiexec returns
#   exit code 3: 8 s
#   SIGKILL:     1 s
# Why it matters: PyTorch's ranks do not call MPI. If one of them fails with an exception the others wait in a collective operation
#   until its timeout, ten minutes or half an hour, and hold their GPUs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet mpich==5.0.1
cat > "$work/rank.sh" <<'SH'
if [ "$PMI_RANK" = 0 ]; then sleep 1; eval "$1"; fi
exec sleep 8
SH
seconds() {
    local begun=$SECONDS
    "$work/venv/bin/mpiexec" -n 2 sh "$work/rank.sh" "$1" >/dev/null 2>&1 || true
    echo $((SECONDS - begun))
}
code=$(seconds "exit 3")
signal=$(seconds 'kill -KILL $$')
echo "exit code 3: $code s"
echo "SIGKILL:     $signal s"
[ "$code" -ge 7 ] && [ "$signal" -le 4 ]
