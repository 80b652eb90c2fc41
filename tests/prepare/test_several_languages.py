"""Many languages in one preparation: each document is split by its own rules and encoded with its own code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lcm_ds.config import EncoderConfig, PrepareConfig
from lcm_ds.data.format import Dataset, open_dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.encoders import load_encoder
from lcm_ds.errors import InputError
from lcm_ds.prepare.pipeline import prepare
from lcm_ds.prepare.state import read_units

# The Universal Declaration of Human Rights in 20 languages, columns as in FineWeb-2.
UDHR = Path(__file__).parents[1] / "fixtures/udhr.parquet"
PAGE = Path(__file__).parents[2] / "docs/data.md"


def config_for(folder: Path, path: Path, sonar: Path, **changes: object) -> PrepareConfig:
    columns = {"language_column": "language", "script_column": "language_script", "languages": "all"}
    source = {"name": "huggingface", "paths": [str(path)], **columns, **changes.pop("source", {})}  # type: ignore[dict-item]
    return PrepareConfig.model_validate(
        {
            "output": str(folder / "out"),
            "source": source,
            "encoder": {"name": "sonar", "model": str(sonar), "dtype": "float32", "device": "cpu"},
            "processes": 1,
            "split_workers": 0,
            "documents_per_shard": 8,
            "validation": 0,
            **changes,
        }
    )


def documents(dataset: Dataset) -> dict[str, tuple[dict, np.ndarray]]:
    """JSON and concepts of each document, by id."""
    found = {}
    for index in range(len(dataset.shards)):
        shard = open_shard(dataset, index)
        for document in range(len(shard)):
            meta = shard.meta(document)
            found[str(meta["id"])] = meta, shard.concepts(document).astype(np.float32)
    return found


@pytest.mark.parametrize("splitter", ["spacy", "icu"])
def test_the_declaration_of_human_rights_in_20_languages(
    tmp_path: Path, tiny_sonar: tuple[Path, Path], splitter: str
) -> None:
    if splitter == "icu":
        pytest.importorskip("icu4py")
    prepare(config_for(tmp_path, UDHR, tiny_sonar[0], sentences={"splitter": splitter}, dtype="float32"))
    dataset = open_dataset(tmp_path / "out/train")
    rows = pyarrow.parquet.read_table(UDHR).to_pylist()
    found = documents(dataset)
    assert sorted(found) == sorted(row["id"] for row in rows)
    for row in rows:
        meta, _ = found[row["id"]]
        sentences = meta["sentences"][:-1]
        assert "".join("".join(sentences).split()) == "".join(row["text"].replace("\u200b", " ").split())
        assert 40 <= len(sentences) <= 200, (row["id"], len(sentences))
        assert max(map(len, sentences)) <= 250
        named = {"cmn": "zho"}.get(row["language"], row["language"])
        assert meta["language"] == f"{named}_{row['language_script']}"
        if splitter == "spacy":
            mean = sum(map(len, sentences)) / len(sentences)
            counts = f"{len(row['text']):,} | {len(sentences)} | {mean:.0f} | {max(map(len, sentences))}"
            assert f"| {meta['language']} | {counts} |" in PAGE.read_text(encoding="utf-8")
    info = dataset.info
    assert info.language is None
    assert info.splitter["language"] == "by document"
    assert info.source["documents_by_language"] == Counter(meta["language"] for meta, _ in found.values())
    # Each with its own code, which is the first of a sentence's tokens.
    encoder = load_encoder(EncoderConfig(name="sonar", model=str(tiny_sonar[0]), dtype="float32", device="cpu"))
    for id in ("udhr-deu_1901", "udhr-tha"):
        meta, concepts = found[id]
        own = load_encoder(encoder.config.model_copy(update={"language": meta["language"]}))  # type: ignore[attr-defined]
        np.testing.assert_allclose(concepts[:-1], own.encode(meta["sentences"][:-1]), atol=1e-4)
        np.testing.assert_allclose(concepts[-1:], encoder.encode(["End of text."]), atol=1e-4)
        assert np.abs(concepts[:-1] - encoder.encode(meta["sentences"][:-1])).max() > 1e-2


def rows_of(tmp_path: Path, rows: list[tuple[str, str | None]]) -> Path:
    lines = [{"id": n, "text": text, "language": code} for n, (text, code) in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return tmp_path / "rows.jsonl"


SAME = "It rains. It rains. The river rises."


@pytest.mark.parametrize("split_workers", [0, 1])
def test_the_same_sentence_in_two_languages_is_encoded_twice(
    tmp_path: Path, tiny_sonar: tuple[Path, Path], split_workers: int
) -> None:
    path = rows_of(tmp_path, [(SAME, "en"), (SAME, "de"), (SAME, "en")])
    changes = {"source": {"script_column": None}, "split_workers": split_workers, "dtype": "int8"}
    prepare(config_for(tmp_path, path, tiny_sonar[0], **changes))
    found = documents(open_dataset(tmp_path / "out/train"))
    np.testing.assert_array_equal(found["0"][1], found["2"][1])
    assert np.abs(found["0"][1][:-1] - found["1"][1][:-1]).max() > 1e-2
    [unit] = read_units(tmp_path / "out")
    assert unit.encoded == 4
    assert unit.languages == {"deu_Latn": 1, "eng_Latn": 2}


def test_documents_of_languages_that_sonar_does_not_know_are_named_and_counted(
    tmp_path: Path, tiny_sonar: tuple[Path, Path]
) -> None:
    path = rows_of(tmp_path, [(SAME, "en"), (SAME, "tlh"), (SAME, "German"), (SAME, None)])
    config = config_for(tmp_path, path, tiny_sonar[0], source={"script_column": None})
    with pytest.raises(InputError, match=r"rows\.jsonl: line 2: 'language' is 'tlh': SONAR has no such language"):
        prepare(config)
    prepare(config.model_copy(update={"max_refused": 0.5, "output": str(tmp_path / "more")}))
    dataset = open_dataset(tmp_path / "more/train")
    assert dataset.info.source["refused"] == {"unreadable": 2}
    assert dataset.info.source["documents_by_language"] == {"deu_Latn": 1, "eng_Latn": 1}


def test_a_repeated_id_is_not_counted_with_its_language(tmp_path: Path, tiny_sonar: tuple[Path, Path]) -> None:
    lines = [{"id": n % 3, "text": f"{SAME} {n}.", "language": code} for n, code in enumerate(["en", "de", "en", "fr"])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {"source": {"script_column": None}, "documents_per_shard": 3}
    prepare(config_for(tmp_path, tmp_path / "rows.jsonl", tiny_sonar[0], **changes))
    source = open_dataset(tmp_path / "out/train").info.source
    assert source["refused"] == {"duplicate_id": 1}
    assert source["documents_by_language"] == {"deu_Latn": 1, "eng_Latn": 2}


def test_a_trained_pipeline_is_of_one_language(tmp_path: Path, tiny_sonar: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"sentences\.pipeline xx_a is of one language: source\.languages has several"):
        config_for(tmp_path, UDHR, tiny_sonar[0], sentences={"pipeline": "xx_a"})


def test_documents_are_split_by_the_rules_of_their_language(tmp_path: Path, tiny_sonar: tuple[Path, Path]) -> None:
    german = "Das ist z. B. gut. Er kommt am 3. Mai. Dann geht er."
    path = rows_of(tmp_path, [(german, "de"), ("今日は雨です。明日は晴れです。", "ja"), ("Một. Hai.", "vi")])
    prepare(config_for(tmp_path, path, tiny_sonar[0], source={"script_column": None}))
    found = documents(open_dataset(tmp_path / "out/train"))
    assert found["0"][0]["sentences"][0] == "Das ist z. B. gut."
    assert found["1"][0]["sentences"][:-1] == ["今日は雨です。", "明日は晴れです。"]
    assert found["2"][0]["sentences"][:-1] == ["Một.", "Hai."]
