#!/bin/bash
# `import openvino` makes an id for the user in the home folder and sends an event to an analytics service, before anything is converted.
#
# Versions: openvino 2026.4.1, openvino-telemetry 2025.2.0, which it depends on.
# Expected: usage data, if at all, from the command-line tools, after a question.
# What happens: the import creates ~/intel/openvino_ga_cid, and forks a process that sends an event "import" to google-analytics.com.
#   Nothing asks, nothing is printed, and a process without network does the same. Without the package openvino-telemetry it does not; nor
#   if CI is set, or after `opt_in_out --opt_out`.
# Seen:
#   as installed: id in the home folder: True; events to www.google-analytics.com: 1
#   without openvino-telemetry: id in the home folder: False; events to www.google-analytics.com: 0
# Why it matters: a library that offers OpenVINO as a backend sends events from each of its users' processes; nodes of clusters often have
#   read-only or shared home folders and no way out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 openvino-telemetry==2025.2.0
cd "$folder"
unset CI TF_BUILD JENKINS_URL
cat > show.py <<'PYTHON'
import os
import pathlib
import time
import urllib.request

home = pathlib.Path(os.environ["HOME"])


def note(request, *_, **__):
    """In place of sending: nothing leaves the machine. A forked process calls it."""
    with (home / "events").open("a") as file:
        file.write(request.host + "\n")


urllib.request.urlopen = note

import openvino  # noqa: E402, F401

time.sleep(3)
hosts = (home / "events").read_text().split() if (home / "events").exists() else []
print(f"id in the home folder: {(home / 'intel/openvino_ga_cid').exists()}; "
      f"events to www.google-analytics.com: {hosts.count('www.google-analytics.com')}")
PYTHON
mkdir first second
echo "as installed: $(HOME=$folder/first venv/bin/python show.py)" | tee seen.txt
venv/bin/pip uninstall --quiet --yes openvino-telemetry
echo "without openvino-telemetry: $(HOME=$folder/second venv/bin/python show.py)" | tee -a seen.txt
grep -q 'as installed: id in the home folder: True; events to www.google-analytics.com: [1-9]' seen.txt
grep -q 'without openvino-telemetry: id in the home folder: False; events to www.google-analytics.com: 0' seen.txt
