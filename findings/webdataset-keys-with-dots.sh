#!/bin/bash
# webdataset does not read back the keys that its own TarWriter writes: documents named by arXiv ids become one.
#
# Versions: webdataset 1.0.2, numpy 2.4.6.
# Expected: a sample that TarWriter accepts comes back with its key and its fields. Where that can't be, the writer refuses it, as it refuses
#   a sample without a key, or the reader reports two samples under one key, as it does for equal field names.
# What happens: the writer puts "KEY.FIELD" into the tar; the reader ends the key at the first dot of the name. Keys 2412.08821 and
#   2412.17149 come back as one sample "2412" with the fields "08821.npy" and "17149.npy". No error, no warning; later
#   documents of that month join them.
# Seen:
#   written [('2412.08821', ['npy']), ('2412.17149', ['npy'])], read [('2412', ['08821.npy', '17149.npy'])]
# Why it matters: ids with dots are common (arXiv, DOI, host names, versions). The count of samples shrinks, and the field
#   that the loader asks for is in none of them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet webdataset==1.0.2 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import numpy as np
import webdataset

path = f"{sys.argv[1]}/documents.tar"
keys = ["2412.08821", "2412.17149"]
with webdataset.TarWriter(path) as writer:
    for key in keys:
        writer.write({"__key__": key, "npy": np.ones((3, 4), np.float16)})
samples = list(webdataset.WebDataset(path, shardshuffle=False))
read = [(sample["__key__"], sorted(field for field in sample if not field.startswith("__"))) for sample in samples]
print("written", [(key, ["npy"]) for key in keys], "read", read)
assert read == [("2412", ["08821.npy", "17149.npy"])], "keys with dots come back now"
PY
