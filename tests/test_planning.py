"""docs/planning.md shows exactly what its commands print, which takes a moment and no data."""

import re
import shlex
import subprocess
import sys

import pytest
from docs import REPOSITORY, blocks
from machine import patience

from lcm_ds.api import TrainConfig, load, plan

PAGE = REPOSITORY / "docs" / "planning.md"
COMMANDS = [command for block in blocks(PAGE) if block.needs is None for command in block.commands]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"line {command.line}")
def test_a_plan_of_the_page_is_what_its_command_prints_within_seconds(command, tmp_path):
    words = [sys.executable, "-m", "lcm_ds.cli", *shlex.split(command.text)[1:]]
    environ = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=patience(3))
    assert (done.returncode, done.stderr) == (0, "")
    pattern = "".join(r"(?:.*\n)*?" if line == "…" else re.escape(line + "\n") for line in command.shown)
    assert re.fullmatch(pattern, done.stdout), f"{command.text}\n\nprints\n\n{done.stdout}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["150m", "400m", "1.6b", "7b"])
def test_the_table_of_micro_batches_is_what_fits(name):
    config = load(TrainConfig, REPOSITORY / f"configs/train/{name}.yaml")
    found = []
    for ranks in (1, 8):
        (fits,) = (line for line in plan(config, ranks) if line.startswith("fits "))
        largest, sizes = re.fullmatch(r"fits +micro_batch_rows up to (.*) on (.*) GB, of .*", fits).groups()
        assert sizes == "24 / 40 / 80 / 141"
        found.append(largest.split(" / "))
    cells = [name, str(config.batch.micro_batch_rows), *map(" / ".join, zip(*found, strict=True))]
    assert f"\n| {' | '.join(cells)} |\n" in PAGE.read_text(encoding="utf-8")


def test_the_page_plans_for_every_size_of_machine():
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "One card of 24 GB", "One card of 80 GB", "Eight H100", "A cluster",
    ]  # fmt: skip
    for section in text.split("\n## ")[1:]:
        assert {"prepare", "train"} <= set(re.findall(r"configs/(prepare|train)/\S+\.yaml .*--dry-run", section))
