#!/bin/bash
# Importing deepspeed imports all of mlflow if it is installed, web framework included, whatever the process wants of it.
#
# Versions: deepspeed 0.19.8, mlflow-skinny 3.17.2, torch 2.13.0 (CPU).
# Expected: an optional tracker is imported when a monitor or the autotuner is used.
# What happens: deepspeed imports its pipeline engine, that the runtime config, that the autotuner, and that mlflow, at module level. So does
#   a process that only asks `deepspeed.accelerator` for the kind of device. What it costs depends on the machine; about a fifth of the
#   import time of a training process on two cores.
# Seen:
#   deepspeed: 484 modules of mlflow
#   deepspeed.accelerator: 484 modules of mlflow
#   torch: 0 modules of mlflow
# Why it matters: every rank of every host pays at each start, and tools that only look at the accelerator, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet deepspeed==0.19.8 mlflow-skinny==3.17.2 torch==2.13.0 setuptools
cd "$folder"
cat > show.py <<'PYTHON'
import importlib
import sys

for name in sys.argv[1].split():
    importlib.import_module(name)
print(sum(module.partition(".")[0] == "mlflow" for module in sys.modules))
PYTHON
declare -A modules
for name in deepspeed deepspeed.accelerator torch; do
    modules[$name]=$(DS_ACCELERATOR=cpu venv/bin/python show.py "$name" 2>/dev/null | tail -1)
    echo "$name: ${modules[$name]} modules of mlflow"
done
[ "${modules[torch]}" -eq 0 ] && [ "${modules[deepspeed]}" -gt 100 ] && [ "${modules[deepspeed.accelerator]}" -gt 100 ]
