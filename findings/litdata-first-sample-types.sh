#!/bin/bash
# litdata stores 1-D arrays without their type and shape and reads all samples with those of the first: other values, no error.
#
# Versions: litdata 0.2.76, torch 2.13.0, numpy 2.4.6.
# Expected: an array comes back with its type, shape and values, as it does if the first sample's array has two dimensions (those carry
#   a header). Where all samples have to agree, the writer refuses the one that does not, as it refuses a float after an int.
# What happens: the first sample chooses the serializer of each field, and for 1-D arrays also the data type, which is noted once
#   for the dataset. Later arrays are written as raw bytes, whatever they are, and read as 1-D arrays of the first type.
# Seen:
#   token ids in the smallest type: written uint16 [1, 2] and uint32 [70000, 5], read uint16 [1, 2] and uint16 [4464, 1, 5, 0]
#   embeddings: written float16 (2,) and float32 (2,), read float16 (2,) and float16 (4,)
#   one vector, then a matrix: written (3,) and (2, 3), read (3,) and (6,)
#   a matrix, then one vector: read (2, 3) and (3,)
# Why it matters: token ids and embeddings of documents are written this way. A tokenizer with more than 65,536 entries, a document of one
#   sentence, or half of a corpus encoded in another precision gives training data that is wrong and has no NaN in it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 litdata==0.2.76 numpy==2.4.6
cat > "$work/arrays.py" <<'PY'
import tempfile

import numpy as np
from litdata import StreamingDataset, optimize

def same(sample):
    return {"array": sample}

def round_trip(*arrays):
    folder = tempfile.mkdtemp()
    optimize(fn=same, inputs=list(arrays), output_dir=folder, num_workers=1, chunk_bytes="1MB", verbose=False)
    dataset = StreamingDataset(folder, shuffle=False)
    return [dataset[index]["array"] for index in range(len(arrays))]

if __name__ == "__main__":
    ids = [np.array([1, 2], np.uint16), np.array([70000, 5], np.uint32)]
    read = round_trip(*ids)
    print("token ids: written", ids, "read", read)
    assert [array.dtype for array in read] == [np.uint16] * 2 and read[1].tolist() == [4464, 1, 5, 0], "types are kept now"
    read = round_trip(np.ones(2, np.float16), np.ones(2, np.float32))
    print("embeddings: written float16 (2,), float32 (2,); read", [f"{array.dtype} {array.shape}" for array in read])
    assert read[1].dtype == np.float16 and read[1].shape == (4,), "types are kept now"
    vector, matrix = np.ones(3, np.float32), np.ones((2, 3), np.float32)
    read = [array.shape for array in round_trip(vector, matrix)]
    print("vector, then matrix: read", read)
    assert read == [(3,), (6,)], "shapes are kept now"
    read = [array.shape for array in round_trip(matrix, vector)]
    print("matrix, then vector: read", read)
    assert read == [(2, 3), (3,)]
PY
DATA_OPTIMIZER_CACHE_FOLDER="$work/cache" DATA_OPTIMIZER_DATA_CACHE_FOLDER="$work/data" TMPDIR="$work" "$work/venv/bin/python" "$work/arrays.py"
