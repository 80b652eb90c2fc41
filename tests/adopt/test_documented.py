"""The commands in the table of docs/data.md work on what their rows name."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from adopting import Made, check
from runs import ROOT

from lcm_ds.cli import main
from lcm_ds.data.format import open_dataset

ROWS = re.findall(
    r"^\| .* \| `(lcm-ds (?:adopt|index|export-data) .*)` \|$", (ROOT / "docs/data.md").read_text(), re.MULTILINE
)
HUB = "OWNER/NAME"  # by test_a_hub_dataset_is_read_by_its_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the rows name, under their names."""
    from datasets import Dataset

    folder, made = tmp_path_factory.mktemp("brought"), Made(60)
    for split in ("train", "validation"):
        (folder / "embeddings" / f"split={split}").mkdir(parents=True)
        pq.write_table(Made(60, len(split)).table(), folder / "embeddings" / f"split={split}" / "0.parquet")
    columns = {f"{part}_sentences{end}": made.table().column(f"text_sentences{end}")
               for part in ("prompt", "answer") for end in ("", "_sonar_emb")}  # fmt: skip
    pq.write_table(pa.table({"id": made.ids, **columns}), folder / "pairs.parquet")
    rows = {"id": made.ids, "sentences": made.sentences, "embeddings": [each.tolist() for each in made.concepts]}
    Dataset.from_dict(rows).save_to_disk(folder / "saved")
    (folder / "arrays").mkdir()
    np.save(folder / "arrays/part.npy", np.concatenate(made.concepts))
    lines = [json.dumps({"id": name, "sentences": each}) for name, each in zip(made.ids, made.sentences, strict=True)]
    (folder / "arrays/part.jsonl").write_text("\n".join(lines))
    (folder / "tars").mkdir()
    with webdataset.TarWriter(str(folder / "tars/a.tar")) as tar:
        for name, concepts in zip(made.ids, made.concepts, strict=True):
            tar.write({"__key__": name, "npy": concepts})
    return folder


def test_the_table_has_a_command_for_each_kind():
    assert [shlex.split(row)[2] for row in ROWS] == [
        "embeddings", "pairs.parquet", "saved", HUB, "arrays", "tars/a.tar", "datasets/adopted/train",
    ]  # fmt: skip


@pytest.mark.parametrize("row", [row for row in ROWS if HUB not in row])
def test_the_command_of_a_row_works(folder, monkeypatch, row):
    monkeypatch.chdir(folder)
    words = shlex.split(row)[1:]
    if words[0] == "export-data" and not Path(words[1]).exists():
        assert main(["adopt", "embeddings", "datasets/adopted"]) == 0
    assert main(words) == 0
    if words[0] == "export-data":
        assert pq.read_metadata(words[2]).num_rows == 60
        return
    output = Path(words[2])
    found = [open_dataset(path.parent) for path in sorted(output.rglob("dataset.json"))]
    assert sum(dataset.info.totals.documents for dataset in found) == (120 if words[1] == "embeddings" else 60)
    if words[1] == "embeddings":
        check(output / "train", Made(60, 5))
        check(output / "validation", Made(60, 10))
