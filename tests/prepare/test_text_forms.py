"""Every row of the table of docs/data.md about text, run: what is brought becomes documents."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from preparing import HashEncoder
from tiny_sonar import save_tiny_sonar

from lcm_ds.config import PrepareConfig, load
from lcm_ds.data.format import open_dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.encoders import load_encoder
from lcm_ds.prepare.pipeline import prepare

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| ([^|]+) \| `((?:'[^']+'|[a-z_.]+=)[^`]*)` \|$", PAGE.partition("\n## Text\n")[2], re.MULTILINE)
FIRST, SECOND = ["The river rises.", "It rains."], ["Nobody came. Nobody went.", "Then it stopped."]


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """The files of the table, each with two documents."""
    import datasets

    folder = tmp_path_factory.mktemp("brought")
    texts = [" ".join(FIRST), " ".join(SECOND)]
    rows = [{"id": n, "text": text} for n, text in enumerate(texts)]
    (folder / "texts").mkdir()
    for row in rows:
        (folder / f"texts/{row['id']}.txt").write_text(row["text"])
    pyarrow.parquet.write_table(pyarrow.table({"id": [0, 1], "body": texts}), folder / "corpus.parquet")
    chapters = {"id": [0, 1], "text": texts, "book": ["A", "A"]}
    pyarrow.parquet.write_table(pyarrow.table(chapters), folder / "chapters.parquet")
    scored = {"id": [0, 1, 2], "text": [*texts, "It is left out."], "score": [3.0, 4.5, 2.9]}
    pyarrow.parquet.write_table(pyarrow.table(scored), folder / "scored.parquet")
    lines = "\n".join(map(json.dumps, rows))
    (folder / "corpus.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), codec="zstd", asbytes=True))
    (folder / "corpus.csv").write_text("id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in rows))
    (folder / "no_ids.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    made = datasets.Dataset.from_list(rows)
    (folder / "folder").mkdir()
    made.to_parquet(folder / "folder/train.parquet")
    made.save_to_disk(folder / "saved")
    card = "configs:\n"
    for config, some in (("deu_Latn", made), ("fra_Latn", made.select([0]))):
        some.to_parquet(folder / f"web/data/{config}/train/000_00000.parquet")
        card += f"- config_name: {config}\n  data_files:\n  - split: train\n    path: data/{config}/train/*\n"
    (folder / "web/README.md").write_text(f"---\n{card}---\n")
    sentences = pyarrow.table({"id": [0, 1], "text": [FIRST, SECOND]})
    pyarrow.parquet.write_table(sentences, folder / "sentences.parquet")
    split = [{"id": n, "text": "\n".join(some)} for n, some in enumerate((FIRST, SECOND))]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, split)))
    columns = {"id": [0, 1], "text": texts, "language": ["eng", "deu"], "language_script": ["Latn", "Latn"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "several.parquet")
    return folder


def test_the_table_has_its_rows():
    assert len(TABLE) == 13


@pytest.mark.parametrize(("form", "keys"), TABLE, ids=[form for form, _ in TABLE])
def test_what_can_be_brought_becomes_documents(form, keys, brought, tmp_path, monkeypatch):
    monkeypatch.chdir(brought)
    overrides = [word.strip("'") for word in re.findall(r"'[^']+'|\S+", keys)]
    if "source.name=files" not in overrides:
        overrides += ["source.name=huggingface", *([] if "source.paths" in keys else ["source.paths=[]"])]
    overrides += [f"output={tmp_path / 'out'}", "validation=0", "min_sentences=1", "split_workers=0"]
    encoder = HashEncoder()
    if "languages" in keys:
        overrides += ["encoder.name=sonar", f"encoder.model={save_tiny_sonar(tmp_path)[0]}", "encoder.device=cpu"]
    config = load(PrepareConfig, ROOT / "configs/prepare/text_files.yaml", overrides)
    prepare(config, load_encoder(config.encoder) if "languages" in keys else encoder)
    dataset = open_dataset(tmp_path / "out/train")
    shard = open_shard(dataset, 0)
    found = [shard.meta(document)["sentences"][:-1] for document in range(len(shard))]
    as_given = "sentence" in form
    assert found == [FIRST, SECOND if as_given else ["Nobody came.", "Nobody went.", "Then it stopped."]]
    assert (dataset.info.splitter.get("splitter") == "none") == as_given
