"""Datasets of the hub: resolved to a commit, read by row groups over the network; other forms are streamed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub import COMMIT, NAME
from machine import patience

HUB = Path(__file__).with_name("hub.py")
READ = """
import json, sys
from lcm_ds.config import SourceConfig
from lcm_ds.errors import InputError
from lcm_ds.text.open import open_source

config = SourceConfig(name="huggingface", **json.loads(sys.argv[1]))
try:
    first = open_source(config)
except InputError as error:
    sys.exit(str(error))
units = [unit for unit, _ in zip(first.units(40), range(5))]
print("looked", file=sys.stderr, flush=True)
second = open_source(config, index=json.loads(json.dumps(first.index())))
documents = [[(d.id, d.text, d.refused) for d in second.documents(*unit)] for unit in units[1:]]
print(json.dumps([first.total, first.describe(), units, documents]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two datasets: parquet files of four row groups of 20 rows, mostly of a column that is not used; and JSONL."""
    (tmp_path / "tables/data").mkdir(parents=True)
    (tmp_path / "lines").mkdir()
    for file in range(2):
        names = {"text": pyarrow.string(), "id": pyarrow.string(), "score": pyarrow.int64(), "filler": pyarrow.string()}
        with pyarrow.parquet.ParquetWriter(tmp_path / f"tables/data/{file}.parquet", pyarrow.schema(names)) as writer:
            for group in range(4):
                numbers = [80 * file + 20 * group + row for row in range(20)]
                filler = [random.Random(n).randbytes(2000).hex() for n in numbers]
                columns = {"text": [f"Text {n}." for n in numbers], "id": [f"{n}" for n in numbers]}
                writer.write_table(pyarrow.table({**columns, "score": [n % 5 for n in numbers], "filler": filler}))
    lines = [json.dumps({"text": f"Line {n}.", "id": f"{n}"}) for n in range(100)]
    (tmp_path / "lines/lines.jsonl").write_text("\n".join(lines) + "\n")
    for name, path in (("tables", "data/*.parquet"), ("lines", "lines.jsonl")):
        card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n---\nTales.\n"
        (tmp_path / name / "README.md").write_text(card)
    return tmp_path


@pytest.fixture
def read(folder: Path) -> Callable:
    """What READ prints of a source of one of the datasets, or its mistakes, and what the hub was asked for."""

    def read(name: str, **source) -> tuple[subprocess.CompletedProcess, str]:
        log = folder / f"{name}.log"
        command = [sys.executable, str(HUB), str(folder / name)]
        with log.open("w") as file:
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        assert server.stdout is not None
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.stdout.readline().strip()}", "HF_HUB_OFFLINE": "0"}
        environ = {**os.environ, **hub, "HF_HOME": str(folder / f"home-{name}"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", READ, json.dumps({"dataset": NAME, "config": name, **source})]
        try:
            done = subprocess.run(
                command, env=environ, capture_output=True, text=True, check=False, timeout=patience(120)
            )
        finally:
            server.kill()
            server.wait()
        return done, log.read_text()

    return read


def test_parquet_of_the_hub_is_read_by_row_groups_at_the_commit(read: Callable, folder: Path) -> None:
    done, log = read("tables", filter={"score": {"min": 3}}, take=150)
    assert done.returncode == 0, done.stderr
    total, described, units, documents = json.loads(done.stdout)
    assert total == 150
    assert described["revision"] == COMMIT
    assert described["files"] == 2
    assert units == [[0, 40], [40, 80], [80, 120], [120, 150]]
    found = [document for unit in documents for document in unit]
    assert found == [
        [f"{n}", f"Text {n}." if n % 5 >= 3 else "", None if n % 5 >= 3 else "filtered"] for n in range(40, 150)
    ]
    ranges = [tuple(map(int, pair)) for pair in re.findall(r"\.parquet bytes=(\d+)-(\d+)", log)]
    size = sum(path.stat().st_size for path in (folder / "tables/data").iterdir())
    assert sum(last - first for first, last in ranges) < 0.5 * size  # the filler stays where it is
    assert f"resolve/{COMMIT}/data/0.parquet" in log


def test_other_forms_are_streamed_to_the_range(read: Callable) -> None:
    done, log = read("lines", skip=10)
    assert done.returncode == 0, done.stderr
    total, _, units, documents = json.loads(done.stdout)
    assert total is None
    assert units[:2] == [[0, 40], [40, 80]]
    assert [id for unit in documents for id, *_ in unit] == [f"{n}" for n in range(50, 100)]
    assert [len(unit) for unit in documents] == [40, 10, 0, 0]  # the end of a stream is where nothing comes
    assert log.count(f"HEAD /datasets/{NAME}/resolve/main/") == 1  # from then on all is of one commit


def test_what_the_hub_does_not_have_is_a_mistake_in_one_line(read: Callable) -> None:
    done, _ = read("tables", split="test")
    assert done.returncode == 1
    assert done.stderr.strip() == f"source.split: {NAME} has no split 'test'; it has train"
    done, _ = read("tables", config="poems")
    assert done.stderr.strip().startswith(f"source: {NAME}: cannot be opened: BuilderConfig 'poems' not found")
    done, _ = read("lines", text_column="content")
    assert "source.text_column" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
