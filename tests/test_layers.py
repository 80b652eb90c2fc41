"""Imports point one way and not in circles, and a training node needs nothing of preparation."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lcm_ds

PACKAGE = Path(lcm_ds.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
GROUND = (
    "config",
    "devices",
    "errors",
    "files",
    "hub",
    "languages",
    "matmul",
    "metrics",
    "processes",
    "signals",
    "terminal",
    "resources",
)
# What each part may import besides itself and GROUND, from the bottom to the top.
MAY_IMPORT = {
    "distributed": (),
    "deepspeed_config": (),
    "text": (),
    "encoders": (),
    "data": (),
    "model": (),
    "adopt": ("data", "text"),
    "baselines": ("data", "model"),
    "checkpoint": ("data", "deepspeed_config", "distributed", "model"),
    "convert": ("checkpoint", "data", "encoders", "model"),
    "prepare": ("adopt", "data", "distributed", "encoders", "text"),
    "train": ("baselines", "checkpoint", "convert", "data", "deepspeed_config", "distributed", "model"),
    "evaluate": ("baselines", "checkpoint", "data", "distributed", "encoders", "model"),
    "generate": ("checkpoint", "data", "encoders", "model", "text"),
    "launcher": ("checkpoint", "deepspeed_config", "distributed", "train"),
    "integrations": ("data", "distributed", "launcher", "prepare", "text"),
    "doctor": ("checkpoint", "deepspeed_config", "distributed", "launcher", "model", "train"),
}
LARGEST_SHARE, MOST_FILES = 0.15, 15


def imports(module):
    """The modules of lcm_ds that a module imports, anywhere in it; `from package import name` counts as the package."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lcm_ds":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def part_of(module):
    return f"{module}.".split(".")[1]


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_one_way(part):
    for module in MODULES:
        if part_of(module) == part:
            wrong = {part_of(other) for other in imports(module)} - {"", part, *GROUND, *MAY_IMPORT[part]}
            assert not wrong, f"{module} imports lcm_ds.{sorted(wrong)}"


def test_every_part_has_its_place():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(MAY_IMPORT)


def test_modules_do_not_import_one_another_in_circles():
    graph = {module: set(imports(module)) - {module} for module in MODULES}
    while leaves := {module for module, others in graph.items() if not others}:
        graph = {module: others - leaves for module, others in graph.items() if module not in leaves}
    assert not graph, f"in circles, or above one: {sorted(graph)}"


def test_no_folder_is_too_large_to_find_anything_in():
    folders = {path.parent for path in MODULES.values()}
    lines = {folder: sum(len(path.read_text().splitlines()) for path in folder.glob("*.py")) for folder in folders}
    for folder in folders:
        assert lines[folder] < LARGEST_SHARE * sum(lines.values()), folder
        files = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(files) <= MOST_FILES, f"{folder}: {len(files)} files"


def test_training_needs_nothing_of_preparation():
    heavy = (
        "spacy",
        "datasets",
        "sentence_transformers",
        "typer",
        "rich",
        "mlflow",
        "wandb",
        "torchao",
        "transformers",
    )
    code = f"import sys, lcm_ds.train.loop, lcm_ds.train.job_builder; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
