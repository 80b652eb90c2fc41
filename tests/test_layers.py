"""Imports point one way, and a training node needs nothing of what prepares data."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lcm_ds

PACKAGE = Path(lcm_ds.__file__).parent
BELOW = ("config", "errors", "files", "metrics", "processes", "quiet", "ds_config", "fairseq2", "resources")
PARTS = ("data", "model", "encoders", "text")
MAY_IMPORT = {
    **{part: (*BELOW, part) for part in PARTS},
    "train": (*BELOW, "data", "model", "train"),
    **{part: (*BELOW, *PARTS, "train", part) for part in ("prepare", "evaluate", "generate", "launcher")},
}


def imported(path):
    """The parts of lcm_ds that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lcm_ds":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lcm_ds."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_one_way(part):
    for path in (PACKAGE / part).rglob("*.py"):
        for name in imported(path):
            assert name in MAY_IMPORT[part] or name.startswith("__"), f"{path} imports lcm_ds.{name}"


def test_training_needs_nothing_of_preparation():
    heavy = ("spacy", "datasets", "sentence_transformers", "typer", "rich")
    code = f"import sys, lcm_ds.train.loop, lcm_ds.train.check; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
