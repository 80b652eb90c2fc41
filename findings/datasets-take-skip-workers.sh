#!/bin/bash
# take(n) and skip(n) of a streaming dataset are other rows with workers or ranks than without: validation rows are trained on.
#
# Versions: datasets 5.2.0, torch 2.13.0 (CPU).
# Expected: take(4) is the first 4 rows and skip(4) the others, as their documentation says, whoever reads them; together they are a split into
#   validation and training data.
# What happens: a DataLoader with workers, and split_dataset_by_node, divide the files first and n by their number: each of 2 workers skips
#   the first 2 rows of its own files. The validation set, which is read without workers or by one rank, shares rows with the training set,
#   and as many rows are in neither. Nothing is raised.
# Seen (4 files of 5 rows, 0 to 19; take(4) without workers is [0, 1, 2, 3]):
#   skip(4), 0 workers: in both [], in neither []
#   skip(4), 2 workers: in both [2, 3], in neither [5, 6]
#   skip(4), 4 workers: in both [1, 2, 3], in neither [5, 10, 15]
#   skip(4), 2 ranks:   in both [2, 3], in neither [5, 6]
# Why it matters: corpora with one split (FineWeb has only "train") are divided in this way. The validation loss is then of documents the model
#   was trained on, and which ones changes with num_workers and the number of GPUs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 datasets==5.2.0 numpy==2.4.6
cat > "$work/split.py" <<'PY'
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

def stream():
    return load_dataset("parquet", data_files=f"{sys.argv[1]}/part*.parquet", split="train", streaming=True)

def rows(source, workers=0):
    return [row["row"] for row in DataLoader(source, batch_size=None, num_workers=workers)]

if __name__ == "__main__":
    for part in range(4):
        pq.write_table(pa.table({"row": range(5 * part, 5 * part + 5)}), f"{sys.argv[1]}/part{part}.parquet")
    validation = rows(stream().take(4))
    assert validation == [0, 1, 2, 3]
    training = {f"{workers} workers": rows(stream().skip(4), workers) for workers in (0, 2, 4)}
    training["2 ranks"] = [row for rank in (0, 1) for row in rows(split_dataset_by_node(stream().skip(4), rank, 2))]
    seen = {}
    for name, read in training.items():
        assert len(read) == len(set(read)) == 16
        both, neither = sorted({*validation} & {*read}), sorted({*range(20)} - {*validation, *read})
        seen[name] = both, neither
        print(f"skip(4), {name + ':':10} in both {both}, in neither {neither}")
    assert seen == {
        "0 workers": ([], []),
        "2 workers": ([2, 3], [5, 6]),
        "4 workers": ([1, 2, 3], [5, 10, 15]),
        "2 ranks": ([2, 3], [5, 6]),
    }, "take() and skip() are other rows now"
PY
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/split.py" "$work"
