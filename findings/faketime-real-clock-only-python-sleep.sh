#!/bin/bash
# With DONT_FAKE_MONOTONIC=1 libfaketime makes Python's time.sleep fail with "Invalid argument".
#
# Versions: libfaketime 0.9.10 (Debian's 0.9.10-2.1), Python 3.11 (which sleeps until a time of the monotonic clock).
# Expected: only the time of day is another one; a sleep, which does not ask for it, is as without the library.
# What happens: clock_nanosleep with an absolute time of CLOCK_MONOTONIC returns EINVAL, also with an offset of 0. Python 3.10, which
#   sleeps by select, is not concerned. If the monotonic clock is faked as well, sleeping works.
# Seen:
#   without it: slept
#   both clocks, +0: slept
#   time of day alone, +0: [Errno 22] Invalid argument
# Why it matters: the usual way to test a cluster's program against a leaping clock ends any process that polls. A preloaded
#   clock_gettime of fifteen lines of C does what is wanted.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
apt-get download -qq libfaketime=0.9.10-2.1 2>/dev/null
dpkg-deb -x libfaketime_*.deb .
library=$(find "$folder" -name libfaketime.so.1)
cat > sleep.py <<'PYTHON'
import time

try:
    time.sleep(0.01)
    print("slept")
except OSError as error:
    print(error)
PYTHON
without=$(python3 sleep.py)
both=$(LD_PRELOAD=$library FAKETIME=+0 python3 sleep.py)
alone=$(LD_PRELOAD=$library FAKETIME=+0 DONT_FAKE_MONOTONIC=1 python3 sleep.py)
echo "without it: $without"
echo "both clocks, +0: $both"
echo "time of day alone, +0: $alone"
[ "$without" = slept ] && [ "$both" = slept ] && [ "$alone" = "[Errno 22] Invalid argument" ]
