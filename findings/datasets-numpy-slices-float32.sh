#!/bin/bash
# datasets' NumPy format turns float64 and float16 into float32, but only in slices, not in single rows.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, numpy 2.4.6.
# Expected: a column with the feature float64 (or float16) comes as an array of that type: the features say so, and the float64
#   of one row does. Integers keep their type.
# What happens: with_format("numpy") gives row 0 as numpy.float64, and the slice [0:2] of the same column as a float32 array. Lists of
#   float64 become float32 in both. float16 is widened in slices and kept in rows.
# Seen:
#   time[0] 1795908860.744 (float64), time[:2] both 1795908864.0 (float32); half[0] float16, half[:2] float32
# Why it matters: seconds since 1970 are two minutes apart in float32, and all rows of a batch seem to have come at once. Scores and offsets
#   lose digits between the code that reads rows and the code that reads batches. Half-precision embeddings take twice the memory planned.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 numpy==2.4.6
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import numpy as np
from datasets import Dataset

times = [1795908860.744, 1795908861.744]
table = Dataset.from_dict({"time": times, "half": np.array([0.1, 0.2], np.float16), "vector": [[0.1, 0.2], [0.3, 0.4]]})
assert str(table.features["time"]) == "Value('float64')" and str(table.features["half"]) == "Value('float16')"
arrays = table.with_format("numpy")
row, rows = arrays[0], arrays[0:2]
print(table.features)
for name in table.column_names:
    print(f"{name}: row {row[name].dtype} {row[name].tolist()}, slice {rows[name].dtype} {rows[name].tolist()}")
assert row["time"].dtype == np.float64 and row["time"] == times[0]
assert rows["time"].dtype == np.float32, "slices keep float64 now"
assert rows["time"].tolist()[0] == rows["time"].tolist()[1] != times[0], "times a second apart differ now"
assert row["half"].dtype == np.float16 and rows["half"].dtype == np.float32, "slices keep float16 now"
assert row["vector"].dtype == rows["vector"].dtype == np.float32, "lists keep float64 now"
PY
