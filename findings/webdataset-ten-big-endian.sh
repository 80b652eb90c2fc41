#!/bin/bash
# webdataset's .ten fields write big-endian arrays as they are and read them as little-endian: other numbers, of the right type and shape.
#
# Versions: webdataset 1.0.2, safetensors 0.8.0, numpy 2.4.6.
# Expected: an array comes back with its values, as from webdataset's .npy and from safetensors; or the writer refuses it, as it refuses
#   uint32.
# What happens: the format notes the type by its name, which is "float32" in either byte order, and then the bytes of the array.
# Seen (np.array([1, 2, 3], ">f4"), and the integers 1, 2 and 3 as ">i4"):
#   .npy [1.0, 2.0, 3.0], safetensors [1.0, 2.0, 3.0], .ten [4.6e-41, 9e-44, 2.3e-41]
#   .npy [1, 2, 3], safetensors [1, 2, 3], .ten [16777216, 33554432, 50331648]
# Why it matters: Java writes big-endian by default, and so do FITS and classic netCDF: embeddings that a service on the JVM exported are
#   read with np.frombuffer(data, ">f4") and compute correctly until they are put into shards. Read back, they are near zero and finite.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet webdataset==1.0.2 safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import numpy as np
import safetensors.numpy
import webdataset

def round_trips(array):
    path = f"{sys.argv[1]}/arrays.tar"
    with webdataset.TarWriter(path) as writer:
        writer.write({"__key__": "a", "npy": array, "ten": [array]})
    (sample,) = webdataset.WebDataset(path, shardshuffle=False).decode()
    return {".npy": sample["npy"], "safetensors": safetensors.numpy.load(safetensors.numpy.save({"a": array}))["a"],
            ".ten": sample["ten"][0]}

for kind in ("f4", "i4"):
    given = np.array([1, 2, 3], ">" + kind)
    for name, array in round_trips(given).items():
        print(f"{name}: {array.dtype.name} {[float(f'{value:.2g}') if kind == 'f4' else value for value in array.tolist()]}")
        assert (array.dtype.name, array.shape) == (given.dtype.name, given.shape)
        expected = given.view("<" + kind) if name == ".ten" else given
        assert array.tolist() == expected.tolist(), f"{name} reads otherwise now"
    assert round_trips(given.astype("<" + kind))[".ten"].tolist() == [1, 2, 3]
try:
    round_trips(np.array([1], np.uint32))
except ValueError as error:
    print("uint32:", error)
else:
    raise SystemExit("the writer takes uint32 now")
PY
