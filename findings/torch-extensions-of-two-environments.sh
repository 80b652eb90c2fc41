#!/bin/bash
# torch.utils.cpp_extension: two virtual environments compile the same extension for each other again and again.
#
# Versions: torch 2.13.0 (CPU), ninja 1.13.0, g++ 12, Python 3.11.
# Expected: an extension that is in the cache (~/.cache/torch_extensions/py311_cpu) is loaded without compiling it. Both environments
#   have the same torch, Python and compiler, and the name of the cache's folder says no more than Python's version and "cpu".
# What happens: the compiler's command line holds the environment's own include folders, so that ninja takes the object file of the
#   other one for old. Each change of the environment compiles anew; within one it is loaded at once.
# Seen: compiled: A yes A no B yes A yes
# Why it matters: DeepSpeed builds its operators so, in the first collective of a process: with two checkouts of a project each start
#   after the other's waits a minute for the compiler, also in ranks that time out in the meantime. TORCH_EXTENSIONS_DIR per environment
#   avoids it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HOME="$work/home"
unset TORCH_EXTENSIONS_DIR
mkdir "$HOME"
echo '#include <torch/extension.h>
int two() { return 2; }
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("two", &two); }' > "$work/two.cpp"
cat > "$work/load.py" <<'PYTHON'
import glob, os, sys
from torch.utils.cpp_extension import load

def built():
    return [os.stat(path).st_mtime_ns for path in glob.glob(os.path.expanduser("~/.cache/torch_extensions/*/two/two.o"))]

before = built()
assert load("two", [sys.argv[1]]).two() == 2
print("yes" if built() != before else "no")
PYTHON
for name in A B; do
    python3 -m venv "$work/$name"
    "$work/$name/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ninja==1.13.0 setuptools
done
seen="compiled:"
for name in A A B A; do
    seen="$seen $name $(PATH="$work/$name/bin:$PATH" "$work/$name/bin/python" "$work/load.py" "$work/two.cpp" 2> "$work/err" || cat "$work/err" >&2)"
done
echo "$seen"
[ "$seen" = "compiled: A yes A no B yes A yes" ]
