#!/bin/bash
# datasets' JSON loader rewrites strings that look like dates, also in a column declared as a string.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1.
# Expected: a JSON string stays the string that it is. With features=Features({"text": Value("string")}) there seems to be no other
#   reading. At the least one column of one file is read in one way.
# What happens: the file is parsed in chunks of about 10 MB, each by pyarrow's JSON reader, which turns a column into timestamps if every
#   string of that chunk looks like an ISO date. The chunk is then cast to the declared or first-seen type, and a timestamp cast to a
#   string has gained a time: "2024-01-02" comes back as "2024-01-02 00:00:00". Where the chunk border falls decides which rows change.
# Seen:
#   declared as string:    '2024-01-02' -> '2024-01-02 00:00:00', '2024-01-02T03:04:05Z' -> '2024-01-02 03:04:05'
#   one 34 MB file:        {'2024-01-02': 123361, '2024-01-02 00:00:00': 276638, 'unknown': 1} of 399,999 times '2024-01-02'
# Why it matters: corpora for language and concept models carry dates, ids and titles as strings (FineWeb's `date`). Keys made of them no longer
#   match between a file and its copy, duplicates are not found, and a row's text depends on the rows around it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import collections
import json
import sys

import datasets
from datasets import Features, Value, load_dataset

datasets.disable_progress_bars()
folder = sys.argv[1]

def rows(name, lines, **options):
    path = f"{folder}/{name}.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return load_dataset("json", data_files=path, split="train", streaming=True, **options)

string = Features({"text": Value("string")})
given = ["2024-01-02", "2024-01-02T03:04:05Z"]
got = [row["text"] for row in rows("declared", [{"text": text} for text in given], features=string)]
print("declared as string:", given, "->", got)
assert got == ["2024-01-02 00:00:00", "2024-01-02 03:04:05"], "declared strings are no longer rewritten"
got = [row["text"] for row in rows("mixed", [{"text": text} for text in [*given, "a day"]], features=string)]
assert got == [*given, "a day"]
print("with one row more that is no date, all rows are kept:", got)
lines = ({"date": "unknown" if row == 0 else "2024-01-02", "text": "x" * 50} for row in range(400_000))
count = collections.Counter(row["date"] for row in rows("long", lines))
print("one file of several chunks:", dict(count))
assert set(count) == {"unknown", "2024-01-02", "2024-01-02 00:00:00"}, "chunks of one file now agree"
PY
