#!/bin/bash
# s3fs: `makedirs` of a folder makes the bucket, and not the folder.
#
# Versions: s3fs 2026.9.0, fsspec 2026.9.0, moto 5.2.5 as the server.
# Expected: on an object store, which has no folders, `makedirs("bucket/run", exist_ok=True)` does nothing, as `makedirs` of a
#   deeper path in an existing bucket does; a bucket that does not exist stays an error, as it is for a write.
# What happens: writing into a bucket that does not exist is refused (FileNotFoundError). After `makedirs("bucket/run")` the bucket
#   exists, and "bucket/run" does not.
# Seen: write: FileNotFoundError · buckets: [] · after makedirs: ['mistyped'], exists("mistyped/run"): False
# Why it matters: code that works on any fsspec file system calls makedirs before it writes, as it has to on a disk. With credentials
#   that may make buckets, a typing error in s3://BUCKET/… then gives a new bucket with the account's defaults (region, retention,
#   encryption, who pays) instead of an error, and the run's checkpoints go there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet s3fs==2026.9.0 fsspec==2026.9.0 'moto[s3]==5.2.5' flask flask-cors
export AWS_DEFAULT_REGION=us-east-1 AWS_ACCESS_KEY_ID=somebody AWS_SECRET_ACCESS_KEY=secret AWS_EC2_METADATA_DISABLED=true
"$work/venv/bin/python" - <<'PYTHON'
import logging

import s3fs
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

logging.disable(logging.INFO)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
host, port = server.get_host_and_port()
files = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}")
try:
    files.pipe_file("mistyped/run/model.pt", b"weights")
    error = None
except Exception as caught:
    error = type(caught).__name__
before = files.ls("", refresh=True)
files.makedirs("mistyped/run", exist_ok=True)
after, there = files.ls("", refresh=True), files.exists("mistyped/run")
print(f"write: {error} · buckets: {before} · after makedirs: {after}, exists(\"mistyped/run\"): {there}")
server.stop()
assert (error, before, after, there) == ("FileNotFoundError", [], ["mistyped"], False)
PYTHON
