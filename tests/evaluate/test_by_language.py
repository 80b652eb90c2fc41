"""Results by language, and evaluation on another language of the same encoder."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from lcm_ds.config import DataConfig
from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.errors import InputError
from lcm_ds.evaluate.compute import MODEL, measure
from lcm_ds.evaluate.languages import languages_of
from lcm_ds.evaluate.report import print_tables
from lcm_ds.evaluate.task import EvaluationTask, open_task
from lcm_ds.evaluate.text_metrics import TextMetrics
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

EMBED_DIM = 8
ENCODER = {"name": "sonar", "model": "hub/sonar", "revision": "a", "language": "eng_Latn"}


def make(folder, languages, encoder=ENCODER, spread=None):
    """A dataset with a document of 6 concepts for each language, which lie around 0, in two shards.

    spread: by language, how far the concepts lie apart; default: 1.
    """
    random = np.random.default_rng(len(languages))
    documents = []
    for number, language in enumerate(languages):
        concepts = random.normal(size=(6, EMBED_DIM)).astype(np.float32) * (spread or {}).get(language, 1.0)
        documents.append(Document(f"{number:04d}", f"d{number}", "made", ["A."] * 6, concepts, language=language))
    folder.mkdir()
    half = len(documents) // 2
    for name, some in (("0.tar", documents[:half]), ("1.tar", documents[half:])):
        commit(folder, write_shard(folder, name, some, "float32"))
    write_normalizer(folder, np.zeros(EMBED_DIM), np.ones(EMBED_DIM), {})
    counts = Counter(language for language in languages if language is not None)
    source = {"documents_by_language": dict(counts)} if counts else {}
    finish(folder, DatasetInfo(encoder=encoder, embed_dim=EMBED_DIM, dtype="float32", source=source))
    return folder


def measured(train, validation, **task):
    data = DataConfig(train=str(train), row_length=12, max_segment=8)
    config = BaseLCMConfig(embed_dim=EMBED_DIM, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = BaseLCM(config).eval()
    opened = EvaluationTask(data, data.train, [open_dataset(train)], open_dataset(validation), str(validation), **task)
    return measure(model, opened, Ranks(), TextMetrics(None, None, None, ()), 8)


def test_each_language_has_its_results(tmp_path, capsys):
    train = make(tmp_path / "train", [None] * 40)
    languages = ["deu_Latn", "eng_Latn", "eng_Latn", "tha_Thai"] * 12
    validation = make(tmp_path / "validation", languages, spread={"deu_Latn": 2.0, "tha_Thai": 0.5})
    result = measured(train, validation)
    found = result["by_language"]
    assert list(found) == ["deu_Latn", "eng_Latn", "tha_Thai"]
    assert {language: each["targets"] for language, each in found.items()} == {
        "deu_Latn": 12 * 5, "eng_Latn": 24 * 5, "tha_Thai": 12 * 5
    }  # fmt: skip
    for name, scores in result["scores"].items():
        parts = [(each["targets"], each["predictors"][name]) for each in found.values()]
        for metric, whole in (("mse", scores["normalised"]["mse"]), ("cosine", scores["raw"]["cosine"])):
            mean = sum(targets * by[metric] for targets, by in parts) / result["targets"]
            assert mean == pytest.approx(whole, rel=1e-6, abs=1e-9)
            for _, by in parts:
                low, high = by[f"{metric}_interval"]
                assert low <= by[metric] <= high
    mean = {language: each["predictors"]["mean concept"]["mse"] for language, each in found.items()}
    assert mean["deu_Latn"] == pytest.approx(4, rel=0.2)
    assert mean["tha_Thai"] == pytest.approx(0.25, rel=0.3)
    json.dumps(result)
    print_tables("a model", {**result, "dataset": "it"})
    table = capsys.readouterr().out.partition("by language")[2].split("95 %")[0]
    assert f"{found['tha_Thai']['predictors'][MODEL]['mse']:.4f}" in table
    assert "(mean concept)" in table


def test_a_dataset_of_one_language_or_none_has_no_such_results(tmp_path):
    train = make(tmp_path / "train", [None] * 10)
    for number, languages in enumerate([["deu_Latn"] * 10, [None] * 10]):
        assert "by_language" not in measured(train, make(tmp_path / f"{number}", languages))


def test_documents_without_a_language_count_for_none(tmp_path):
    dataset = open_dataset(make(tmp_path / "some", ["tha_Thai", None, "deu_Latn", "tha_Thai"]))
    found = languages_of(dataset)
    assert found.names == ["deu_Latn", "tha_Thai"]
    assert found.of_document.tolist() == [1, -1, 0, 1]
    result = measured(make(tmp_path / "train", [None] * 10), tmp_path / "some")
    assert sum(each["targets"] for each in result["by_language"].values()) == 15 < result["targets"]


class _Source:
    """What `open_task` needs of a model."""

    def __init__(self, train, validation):
        self.path, self.run, self.info = train, train, None
        self.data = DataConfig(train=str(train), validation=str(validation), row_length=16, max_segment=8)
        self.training = self.data.train

    def open_datasets(self, paths):
        return [open_dataset(path) for path in paths]

    def check_embed_dim(self, dataset):
        assert dataset.embed_dim == EMBED_DIM


def test_a_model_is_evaluated_on_other_languages_of_its_encoder_only(tmp_path):
    train = make(tmp_path / "train", [None] * 10)
    german = make(tmp_path / "german", [None] * 4, {**ENCODER, "language": "deu_Latn"})
    task = open_task(_Source(train, german), None)
    [note] = task.notes
    assert note.endswith(f"that of {german} have language eng_Latn and deu_Latn")
    assert note in measured(train, german, notes=task.notes)["notes"]
    assert open_task(_Source(train, train), None).notes == ()
    for key in ("name", "model", "revision"):
        other = make(tmp_path / key, [None] * 4, {**ENCODER, key: "b"})
        with pytest.raises(InputError, match="the model was trained on"):
            open_task(_Source(train, train), str(other))
