"""`inspect` says what a dataset holds and what is wrong with it; `fit-normalizer` makes one normaliser of several."""

import json
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from preparing import HashEncoder
from safetensors import safe_open
from safetensors.numpy import load_file

from lcm_ds.cli import main
from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import (
    NORMALIZER,
    DatasetInfo,
    commit,
    finish,
    open_dataset,
    read_normalizer,
    write_normalizer,
)
from lcm_ds.data.shard import open_shard
from lcm_ds.data.tools.fit_normalizer import fit_normalizer
from lcm_ds.data.tools.index import index
from lcm_ds.data.tools.inspect import inspect
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.errors import InputError
from lcm_ds.prepare.pipeline import prepare

LENGTHS = [2, 3, 3, 5, 9, 17]


def prepared(folder, name, encoder=None, lengths=LENGTHS, **changes):
    """A dataset of documents of so many sentences."""
    path = folder / f"{name}.jsonl"
    with path.open("w") as file:
        for number, length in enumerate(lengths):
            text = " ".join(f"Sentence {line} of {name} {number} is here." for line in range(length))
            file.write(json.dumps({"id": f"{name}-{number}", "text": text}) + "\n")
    mapping = {
        "output": str(folder / name),
        "source": {"name": "huggingface", "paths": [str(path)]},
        "encoder": {"name": "sentence-transformers", "model": "minilm"},
        "documents_per_shard": 2,
        "validation": 0,
        "split_workers": 0,
        **changes,
    }
    prepare(PrepareConfig(**mapping), encoder or HashEncoder())
    return folder / name


@pytest.fixture
def dataset(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = prepared(tmp_path, "tales")
    capsys.readouterr()
    return out


def test_a_dataset_is_shown_with_its_lengths_as_histograms(dataset, capsys):
    inspect(dataset)
    out = capsys.readouterr().out
    words = [line.strip("│ ").split() for line in out.splitlines()]
    bars = [(line[0], len(line[1]), line[2]) for line in words if len(line) == 3 and set(line[1]) == {"█"}]
    # The longest bar of each histogram has 28 characters: of LENGTHS by powers of two, and of 39 sentences that have
    # 30 or 31 characters each.
    assert bars == [("2–3", 28, "3"), ("4–7", 9, "1"), ("8–15", 9, "1"), ("16–31", 9, "1"), ("16–31", 28, "39")]
    assert "median 4, mean 6.5" in out
    assert "blake2b" in out
    assert "sentencizer" in out
    assert open_dataset(dataset / "train").fingerprint in out


def test_a_sample_of_documents_is_always_the_same_and_has_every_sentence(dataset, capsys):
    inspect(dataset, sample=3)
    first = capsys.readouterr().out
    inspect(dataset, sample=3)
    assert capsys.readouterr().out == first
    shown = [line for line in first.splitlines() if line.startswith("tales-")]
    assert len(shown) == 3
    number = int(shown[0].split()[0].removeprefix("tales-"))
    for line in range(LENGTHS[number]):
        assert f"{line}  Sentence {line} of tales {number} is here." in first
    inspect(dataset, sample=100)
    assert sum(line.startswith("tales-") for line in capsys.readouterr().out.splitlines()) == len(LENGTHS)


def test_verify_reads_all_again_and_names_every_shard_that_changed(dataset, capsys):
    inspect(dataset, verify=True)
    assert "3 shards verified: every checksum and every document is as written" in capsys.readouterr().out
    shards = sorted((dataset / "train").glob("*.tar"))
    for shard in shards[1:]:
        content = bytearray(shard.read_bytes())
        content[650] ^= 1  # in the first concept: behind a tar header of 512 bytes and an .npy header of 128
        shard.write_bytes(content)
    inspect(dataset)  # without verify nothing is read again
    with pytest.raises(InputError) as caught:
        inspect(dataset, verify=True)
    assert [Path(line.split(": ")[0]).name for line in caught.value.errors] == ["00000001.tar", "00000002.tar"]
    assert main(["inspect", str(dataset), "--verify"]) == 2


def test_verify_names_all_that_is_wrong_at_once_missing_and_shortened_shards_too(dataset, capsys):
    absent, short, changed = sorted((dataset / "train").glob("*.tar"))
    absent.unlink()
    short.write_bytes(short.read_bytes()[:-512])
    one_sentence_less = changed.read_bytes().replace(b'.", "Sentence 2', b".,   Sentence 2", 1)
    changed.write_bytes(one_sentence_less)
    with pytest.raises(InputError) as caught:
        inspect(dataset, verify=True)
    told = [line.removeprefix(str(dataset / "train") + "/") for line in caught.value.errors]
    assert told[0].startswith("00000000.tar: cannot be read: No such file")
    assert "00000001.tar: has" in told[1]
    assert "bytes, shards.jsonl lists" in told[1]
    assert "00000002.tar: has sha256" in told[2]
    assert "sentences and" in told[3]


def test_a_sentence_cannot_command_the_terminal(tmp_path, capsys):
    sentences = ["A red \x1b[31mtitle\x07.", "Next.", "End of text."]
    folder = tmp_path / "odd"
    folder.mkdir()
    concepts = np.random.default_rng(0).normal(size=(3, 4))
    commit(folder, write_shard(folder, "a.tar", [Document("a", "a", "s", sentences, concepts)]))
    write_normalizer(folder, np.zeros(4), np.ones(4), {})
    finish(folder, DatasetInfo(encoder={"name": "none"}, embed_dim=4, dtype="float16"))
    inspect(folder, sample=1)
    out = capsys.readouterr().out
    assert "0  A red �[31mtitle�." in out
    assert main(["inspect", str(folder), "--sample", "-1"]) == 2


def test_a_dataset_at_a_url_is_inspected_and_verified(dataset, capsys):
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset / "train"), "/tales/train", recursive=True)
    try:
        inspect("memory://tales", verify=True, sample=2)
        assert "3 shards verified" in capsys.readouterr().out
        memory.pipe("/tales/train/00000001.tar", b"other bytes")
        with pytest.raises(InputError, match=r"00000001\.tar: came with 11 bytes"):
            inspect("memory://tales", verify=True)
    finally:
        memory.rm("/tales", recursive=True)


# --- fit-normalizer ---------------------------------------------------------------------------------------------------


class Shifted(HashEncoder):
    """Concepts somewhere else."""

    def embed(self, batch):
        return super().embed(batch) + 1


def concepts_of(folder):
    dataset = open_dataset(folder)
    shards = [open_shard(dataset, index) for index in range(len(dataset.shards))]
    return np.concatenate([shard.concepts(i) for shard in shards for i in range(len(shard))]).astype(np.float32)


def test_a_mixture_has_one_normaliser_fitted_by_weight(tmp_path, capsys):
    low = prepared(tmp_path, "low", lengths=[50] * 20) / "train"
    high = prepared(tmp_path, "high", Shifted(), lengths=[50] * 20) / "train"
    assert main(["fit-normalizer", f"{low}=3", f"{high}=1"]) == 0
    out = capsys.readouterr().out
    assert "75.0% of the sample" in out
    center, scale = read_normalizer(low)
    assert all(np.array_equal(one, other) for one, other in zip((center, scale), read_normalizer(high), strict=True))
    # Three quarters around 0 and one around 1, a standard deviation of 0.05 each: the median lies in the lower part.
    assert np.allclose(center, np.percentile(concepts_of(low), 66.7, axis=0), atol=0.03)
    fit_normalizer([f"{low}=1", f"{high}=3"])
    assert (read_normalizer(low)[0] > 0.9).all()
    open_dataset(low)  # still a finished dataset


def test_the_normaliser_of_short_supervised_documents_is_that_of_their_sentences(tmp_path):
    questions = tmp_path / "questions.jsonl"
    with questions.open("w") as file:
        for number in range(300):
            row = {"id": str(number), "q": f"Question {number} is here.", "a": f"Answer {number} is here."}
            file.write(json.dumps(row) + "\n")
    source = {"name": "huggingface", "paths": [str(questions)], "source_column": "q", "target_column": "a"}
    out = prepared(tmp_path, "pairs", source=source, documents_per_shard=150) / "train"
    dataset = open_dataset(out)
    documents = [shard.concepts(i) for shard in map(partial(open_shard, dataset), (0, 1)) for i in range(150)]
    assert {len(document) for document in documents} == {4}  # a question, the suffix, an answer, the end of text
    sentences = np.concatenate([document[[0, 2]] for document in documents]).astype(np.float32)
    low, middle, high = np.percentile(sentences, (25, 50, 75), axis=0)
    assert ((high - low) * 0.7413 > 0.8 * sentences.std(0)).all()

    fit_normalizer([str(out)], output=str(tmp_path / "fitted.safetensors"))
    index(str(out / "{00000000..00000001}.tar"), tmp_path / "index", like=str(out), supervised=dataset.info.supervised)
    for file in (out / NORMALIZER, tmp_path / "fitted.safetensors", tmp_path / "index" / NORMALIZER):
        found = load_file(file)
        assert np.allclose(found["center"], middle)
        assert np.allclose(found["scale"], (high - low) * 0.7413)
        with safe_open(file, "np") as opened:
            statistics = json.loads(opened.metadata()["statistics"])
        assert statistics["samples"] == 600
        told = statistics["mixture"][0] if "mixture" in statistics else statistics
        assert told["left_out"] == ["end_of_text", "source_suffix"]


def test_with_an_output_the_datasets_stay_as_they_are(dataset, tmp_path):
    before = (dataset / "train/normalizer.safetensors").read_bytes()
    fit_normalizer([str(dataset / "train")], output=str(tmp_path / "n.safetensors"))
    assert (dataset / "train/normalizer.safetensors").read_bytes() == before
    center, scale = read_normalizer(dataset / "train")
    written = load_file(tmp_path / "n.safetensors")
    assert np.array_equal(written["center"], center)
    assert np.array_equal(written["scale"], scale)


def test_a_dataset_at_a_url_is_fitted_to_as_the_same_one_on_this_machine(dataset, tmp_path):
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    fit_normalizer([str(dataset / "train")], samples=20, output=str(here))
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset / "train"), "/fitted/train", recursive=True)
    try:
        fit_normalizer(["memory://fitted/train=2"], samples=20, output=str(there))
        with pytest.raises(InputError, match="write the normaliser with --output"):
            fit_normalizer(["memory://fitted/train"])
    finally:
        memory.rm("/fitted", recursive=True)
    ours, theirs = load_file(here), load_file(there)
    assert ours.keys() == theirs.keys() == {"center", "scale"}
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_mistakes_in_a_mixture_are_told_at_once_and_nothing_is_written(dataset, tmp_path):
    other = prepared(tmp_path, "other", HashEncoder(revision="b")) / "train"
    before = (other / "normalizer.safetensors").read_bytes()
    with pytest.raises(InputError) as caught:
        fit_normalizer([str(dataset / "train"), f"{other}=2", f"{other}=none", str(tmp_path / "absent")])
    weight, absent, encoder = caught.value.errors
    assert "the weight behind = has to be a number above 0, not 'none'" in weight
    assert "no such dataset folder" in absent
    assert "'revision': 'b'" in encoder
    assert (other / "normalizer.safetensors").read_bytes() == before


def test_a_sample_without_spread_is_refused(dataset):
    with pytest.raises(InputError, match="--samples: 1 is below 2"):
        fit_normalizer([str(dataset / "train")], samples=1)
