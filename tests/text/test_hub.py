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

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hub import COMMIT, NAME
from machine import patience

from lcm_ds.config import SourceConfig
from lcm_ds.text.open import open_source

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
documents = [[(d.id, d.text, d.refused, d.language) for d in second.documents(*unit)] for unit in units[1:]]
print(json.dumps([first.total, first.describe(), units, documents]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three datasets: parquet files of four row groups of 20 rows, mostly of a column that is not used; JSONL; and
    parquet in FineWeb-2's layout, 50 rows a file."""
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
    card = "configs:\n"
    for config in ("deu_Latn", "deu_Latn_removed", "cmn_Hani"):
        card += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "test") if config == "deu_Latn" else ("train",):
            card += f"  - split: {split}\n    path: data/{config}/{split}/*\n"
            (tmp_path / "web/data" / config / split).mkdir(parents=True)
            for file in range(2 if split == "train" else 1):
                ids = [f"<urn:uuid:{config}-{split}-{50 * file + n}>" for n in range(50)]
                language, script = config.split("_")[:2]
                columns = {"text": [f"Text {id}." for id in ids], "id": ids, "dump": ["CC-MAIN-2013-20"] * 50}
                columns |= {
                    "url": ["https://example.org"] * 50,
                    "language": [language] * 50,
                    "language_score": [0.9] * 50,
                }
                columns |= {
                    "language_script": [script] * 50,
                    "minhash_cluster_size": [1] * 50,
                    "top_langs": ["{}"] * 50,
                }
                path = tmp_path / f"web/data/{config}/{split}/000_{file:05d}.parquet"
                pyarrow.parquet.write_table(pyarrow.table(columns), path)
    (tmp_path / "web/README.md").write_text(f"---\n{card}---\nAs FineWeb-2 has it.\n")
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
        [f"{n}", f"Text {n}." if n % 5 >= 3 else "", None if n % 5 >= 3 else "filtered", None] for n in range(40, 150)
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


WEB = {"language_column": "language", "script_column": "language_script", "languages": "all"}


def test_a_language_of_fineweb_2_is_a_config(read: Callable, folder: Path) -> None:
    done, log = read("web", config="deu_Latn", **WEB)
    assert done.returncode == 0, done.stderr
    total, described, units, documents = json.loads(done.stdout)
    assert (total, described["files"], described["revision"]) == (100, 2, COMMIT)
    assert units == [[0, 50], [50, 100]]
    ids = [f"<urn:uuid:deu_Latn-train-{n}>" for n in range(50, 100)]
    assert documents == [[[id, f"Text {id}.", None, "deu_Latn"] for id in ids]]
    assert "cmn_Hani/train/000" not in log.split("looked")[-1]
    done, _ = read("web", config="deu_Latn", split="test", **WEB)
    assert json.loads(done.stdout)[0] == 50


def test_files_of_the_hub_may_be_named_by_globs(read: Callable) -> None:
    globs = [f"hf://datasets/{NAME}/data/{config}/train/*.parquet" for config in ("deu_Latn", "cmn_Hani")]
    done, log = read("web", dataset=None, config=None, paths=globs, **WEB)
    assert done.returncode == 0, done.stderr
    total, described, _, documents = json.loads(done.stdout)
    assert (total, described["files"], described["revision"]) == (200, 4, COMMIT)
    found = [document for unit in documents for document in unit]  # but the first 50
    assert [language for *_, language in found] == ["deu_Latn"] * 50 + ["zho_Hans"] * 100
    assert f"resolve/{COMMIT}/data/cmn_Hani/train/000_00001.parquet" in log
    assert "resolve/main" not in log
    done, _ = read("web", dataset=None, config=None, paths=[f"hf://datasets/{NAME}/data/fra_Latn/*.parquet", *globs])
    assert done.stderr.strip() == f"source.paths: {NAME}/data/fra_Latn/*.parquet: no such file"
    done, _ = read("web", dataset=None, config=None, paths=["hf://datasets/tales/of-nothing/*.parquet"])
    assert done.stderr.startswith("source.paths: hf://datasets/tales/of-nothing/*.parquet: cannot be listed: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_in_the_layout_of_the_hub_has_its_configs(folder: Path) -> None:
    for config, split, rows in (("deu_Latn", "train", 100), ("deu_Latn", "test", 50), ("cmn_Hani", "train", 100)):
        settings = {"name": "huggingface", "dataset": str(folder / "web"), "config": config, "split": split, **WEB}
        of = open_source(SourceConfig.model_validate(settings))
        found = list(of.documents())
        assert [document.id for document in found] == [f"<urn:uuid:{config}-{split}-{n}>" for n in range(rows)]
        assert {document.language for document in found} == {"deu_Latn" if config == "deu_Latn" else "zho_Hans"}


def test_globs_in_urls_are_expanded(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder / "tables/data"), "/tables", recursive=True)
    of = open_source(SourceConfig(name="huggingface", paths=["memory://tables/*.parquet"]))
    assert of.total == 160
    assert next(of.documents(80, 81)).id == "80"
    memory.rm("/tables", recursive=True)
