#!/bin/bash
# pyarrow: ParquetFile(path, buffer_size=N) still reads whole row groups at once.
#
# Versions: pyarrow 26.0.1.
# Expected: with a buffer_size of 64 KiB the first batch of 1,000 rows takes a few reads of about that size; its documentation says that
#   it "enables read buffering when deserializing individual column chunks".
# What happens: the first batch reads the complete column chunk in one piece, as without buffer_size, because pre_buffer, which is true by
#   default, reads all chunks of a row group before the first batch. Only with pre_buffer=False does buffer_size do anything. Nothing warns.
# Seen: a row group of 16.0 MB, iter_batches(batch_size=1000), one batch: default 16.0 MB in a read; buffer_size=65536 the same;
#   buffer_size=65536, pre_buffer=False: at most 0.1 MB in a read, 0.2 MB in all.
# Why it matters: files of embeddings have row groups of hundreds of MB to GB. A reader that set buffer_size to bound its memory holds the
#   whole row group, in each of its processes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pyarrow==26.0.1
"$work/venv/bin/python" - "$work/numbers.parquet" <<'PYTHON'
import sys

import pyarrow as pa
import pyarrow.parquet as pq

path, rows = sys.argv[1], 2_000_000
column = pa.array(range(rows), pa.float64())
pq.write_table(pa.table({"x": column}), path, compression=None, use_dictionary=False, row_group_size=rows)


class Counted:
    """A file that notes the sizes of what is read."""

    closed = False

    def __init__(self):
        self.file, self.sizes = open(path, "rb"), []

    def read(self, size=-1):
        data = self.file.read(size)
        self.sizes.append(len(data))
        return data

    def __getattr__(self, name):
        return getattr(self.file, name)


def first_batch(**options):
    """The largest read, and all of them, in MB, for one batch."""
    counted = Counted()
    batches = pq.ParquetFile(pa.PythonFile(counted, mode="r"), **options).iter_batches(batch_size=1000)
    assert len(next(batches)) == 1000
    return max(counted.sizes) / 1e6, sum(counted.sizes) / 1e6


default, buffered = first_batch(), first_batch(buffer_size=65536)
unbuffered = first_batch(buffer_size=65536, pre_buffer=False)
for name, (largest, total) in {"default": default, "buffer_size": buffered, "and pre_buffer=False": unbuffered}.items():
    print(f"{name}: largest read {largest:.1f} MB, all {total:.1f} MB")
assert default[0] > 15 and buffered == default, "buffer_size bounds a read now"
assert unbuffered[0] < 0.5
PYTHON
