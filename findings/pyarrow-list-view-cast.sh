#!/bin/bash
# pyarrow: casting a list view to a list loses the last list.
#
# Versions: pyarrow 26.0.1.
# Expected: pa.array([[1, 2], [3]], pa.list_view(pa.int64())).cast(pa.list_(pa.int64())) has the same values, as the same cast in the
#   other direction does, or is refused.
# What happens: the offsets of the result have one entry too few, and the last list reads as an empty one; nothing is raised. Only
#   validate(full=True), which no one calls after a cast, says that the array is invalid.
# Seen: [[1, 2], [3]] -> [[1, 2], []] · validate: ArrowInvalid · pa.array(view.to_pylist(), list): [[1, 2], [3]]
# Why it matters: list views come from Polars, DuckDB and Velox in Arrow files. Readers that know only lists cast them first, and the last
#   document of every batch then has no sentences, or no embeddings, without a word.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pyarrow==26.0.1
"$work/venv/bin/python" - <<'PYTHON'
import pyarrow as pa

view = pa.array([[1, 2], [3]], pa.list_view(pa.int64()))
cast = view.cast(pa.list_(pa.int64()))
try:
    cast.validate(full=True)
    valid = "valid"
except pa.ArrowInvalid:
    valid = "ArrowInvalid"
first, again = cast[0].as_py(), pa.array(view.to_pylist(), pa.list_(pa.int64())).to_pylist()
print(f"{view.to_pylist()} -> {cast.to_pylist()} · validate: {valid} · pa.array(view.to_pylist(), list): {again}")
assert len(cast.buffers()[1]) < 4 * (len(cast) + 1)  # the offsets
assert (first, valid, again) == ([1, 2], "ArrowInvalid", [[1, 2], [3]])
PYTHON
