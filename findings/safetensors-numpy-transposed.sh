#!/bin/bash
# safetensors.numpy writes other values than the array holds if the array is transposed or Fortran-ordered.
#
# Versions: safetensors 0.8.0, numpy 2.4.6 (Python 3.11).
# Expected: safetensors.torch.save_file refuses a non-contiguous tensor ("You are trying to save a non contiguous tensor"). The
#   NumPy functions take the same dictionaries and ask for contiguous arrays only in a line of the docstring, so a reader expects the
#   same refusal, or a copy in C order as numpy.save makes. Release 0.7.0 did keep the values (upstream: safetensors issue 825, open).
# What happens: save() and save_file() write the raw memory of the array under the shape of the view. Loading gives an array
#   of the right shape and type with the values in the wrong places. There is no error and no warning.
# Seen:
#   saved   [[0, 3], [1, 4], [2, 5]]
#   loaded  [[0, 1], [2, 3], [4, 5]]
# Why it matters: converters between frameworks transpose weights (Linear kernels of JAX and TensorFlow are stored the other way round).
#   A square weight that was exported as `w.T` loads everywhere, passes every check of names, shapes and types, and is the wrong matrix.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import numpy as np
from safetensors.numpy import load, load_file, save, save_file

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
path = f"{sys.argv[1]}/weights.safetensors"
for name, view in {"transposed": weight.T, "Fortran order": np.asfortranarray(weight)}.items():
    save_file({"w": view}, path)
    loaded = load_file(path)["w"]
    print(f"{name}: saved {view.tolist()}, loaded {loaded.tolist()}")
    assert loaded.shape == view.shape and loaded.dtype == view.dtype
    assert not np.array_equal(loaded, view), "safetensors.numpy now keeps the values"
    assert np.array_equal(loaded.ravel(), view.ravel(order="K")), "no longer the array's memory order"
    assert np.array_equal(load(save({"w": view}))["w"], loaded)
save_file({"w": np.ascontiguousarray(weight.T)}, path)
assert np.array_equal(load_file(path)["w"], weight.T)
print("np.ascontiguousarray() before saving gives the right values")
PY
