#!/bin/bash
# SummaryWriter.add_embedding writes a label with a line break as two rows: all later labels belong to the wrong point.
#
# Versions: torch 2.13.0, tensorboard 2.21.0.
# Expected: metadata is "a list of labels, each element will be converted to string": label 3 stands at point 3, whatever its text. The function
#   checks that there are as many labels as points.
# What happens: the labels are joined with line breaks into metadata.tsv without escaping. The check counts list elements, so three labels
#   pass; the file has four rows. The projector reads row n as the label of point n.
# Seen:
#   3 points, labels 'one', 'two\nhalf', 'three' -> metadata.tsv rows ['one', 'two', 'half', 'three']
# Why it matters: the usual labels of sentence embeddings are the sentences, and sentences from text files hold line breaks. The
#   projector then shows neighbours with other sentences' words: the embedding looks bad where only the labels are.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 tensorboard==2.21.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY'
import pathlib
import sys

import torch
from torch.utils.tensorboard import SummaryWriter

labels = ["one", "two\nhalf", "three"]
with SummaryWriter(f"{sys.argv[1]}/board") as writer:
    writer.add_embedding(torch.eye(3), metadata=labels, tag="sentences")
(folder,) = pathlib.Path(sys.argv[1], "board").rglob("metadata.tsv")
rows = folder.read_text().rstrip("\n").split("\n")
points = (folder.parent / "tensors.tsv").read_text().rstrip("\n").split("\n")
print(len(points), "points; labels", rows)
assert len(points) == 3 and rows == ["one", "two", "half", "three"], "labels are escaped now"
assert rows[2] != labels[2]
PY
