"""Many processes adopt what one adopts, also if they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from adopting import Made, documents
from machine import patience
from preparing import written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of different row groups, one of which is a single large one."""
    folder = tmp_path_factory.mktemp("adopted")
    for number, rows in enumerate((3, 1000, 7, 50)):
        pq.write_table(Made(120, number).table(), folder / f"{number}.parquet", row_group_size=rows)
    return folder


def command(folder: Path, output: Path, processes: int) -> list[str]:
    words = [
        "adopt",
        str(folder),
        str(output),
        "--processes",
        str(processes),
        "validation=0.2",
        "documents_per_shard=8",
    ]
    return [sys.executable, "-m", "lcm_ds.cli", *words]


def shards(output: Path) -> dict[str, object]:
    """What is written but the index, whose records are in the order of the commits, and what lists it."""
    kept = (".tar", ".safetensors", "units.jsonl", "source.json")
    return {name: data for name, data in written(output).items() if name.endswith(kept)}


@pytest.mark.slow
def test_three_processes_killed_once_write_the_shards_of_one(folder, tmp_path):
    done = subprocess.run(command(folder, tmp_path / "one", 1), capture_output=True, text=True, check=True)
    assert "480 documents: " in done.stdout
    process = subprocess.Popen(command(folder, tmp_path / "three", 3), start_new_session=True)
    units, until = tmp_path / "three/units.jsonl", time.monotonic() + patience(60)
    while not (units.exists() and units.read_text().count("\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "three/train/dataset.json").exists()
    done = subprocess.run(command(folder, tmp_path / "three", 3), capture_output=True, text=True, check=True)
    assert "resuming after" in done.stdout
    assert shards(tmp_path / "three") == shards(tmp_path / "one")
    found = [documents(tmp_path / "three" / split) for split in ("train", "validation")]
    assert sorted([*found[0], *found[1]]) == sorted(name for number in range(4) for name in Made(120, number).ids)
    done = subprocess.run(command(folder, tmp_path / "three", 3), capture_output=True, text=True, check=True)
    assert "already prepared" in done.stdout


def test_a_file_that_changes_before_a_resume_is_named(folder, tmp_path, adopt, capsys):
    from lcm_ds.adopt.command import adoption_config
    from lcm_ds.errors import InputError
    from lcm_ds.prepare.pipeline import prepare

    own = tmp_path / "own"
    own.mkdir()
    pq.write_table(Made(30).table(), own / "a.parquet", row_group_size=5)
    out = adopt(own / "a.parquet")
    (out / "train/dataset.json").unlink()
    pq.write_table(Made(31).table(), own / "a.parquet", row_group_size=5)
    config = adoption_config(str(own / "a.parquet"), str(out), overrides=["validation=0", "documents_per_shard=10"])
    with pytest.raises(InputError, match=r"a.parquet: has \d+ bytes, but had \d+ when .* was started"):
        prepare(config.model_copy(update={"processes": 1}))
