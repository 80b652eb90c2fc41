"""Text → dataset: the same bytes however often it was killed, every document in one split, every refusal counted."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from preparing import HashEncoder

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import open_dataset, read_normalizer
from lcm_ds.data.reader import open_shard
from lcm_ds.errors import InputError
from lcm_ds.prepare.inspect import inspect
from lcm_ds.prepare.pipeline import prepare, split_of

DOCUMENTS = 60
SCRIPT = Path(__file__).with_name("preparing.py")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Text files of a few sentences each."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(DOCUMENTS):
        sentences = [f"Line {line} of story {number} ends here." for line in range(3 + number % 5)]
        (folder / f"{number:03d}.txt").write_text("This is a header. " + " ".join(sentences))
    return folder


@pytest.fixture
def make_config(texts, tmp_path):
    def make(**changes):
        mapping = {
            "output": str(tmp_path / "out"),
            "source": {"name": "files", "paths": [str(texts / "*.txt")]},
            "encoder": {"name": "sentence-transformers", "model": "minilm"},
            "documents_per_shard": 10,
            "validation": 0.2,
            **changes,
        }
        return PrepareConfig(**mapping)

    return make


def written(folder):
    """Everything that a dataset consists of, but for the order in which lines were appended."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    files = [path for path in files if path.name not in ("prepare.yaml", "prepare.lock")]
    bytes_of = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: sorted(data.splitlines()) if name.endswith(".jsonl") else data for name, data in bytes_of.items()}


def documents(folder):
    """(split, document's meta, concepts) of every document."""
    found = []
    for split in ("train", "validation"):
        dataset = open_dataset(Path(folder) / split)
        for index in range(len(dataset.shards)):
            shard = open_shard(dataset, index)
            found += [(split, shard.meta(i), np.array(shard.concepts(i))) for i in range(len(shard))]
    return found


def test_every_document_is_in_one_split_with_a_concept_for_each_sentence(make_config):
    config, encoder = make_config(), HashEncoder()
    prepare(config, encoder)
    found = documents(config.output)
    assert len({meta["id"] for _, meta, _ in found}) == len(found) == DOCUMENTS
    for split, meta, concepts in found:
        assert split == split_of(meta["id"], config.validation)
        assert meta["sentences"][-1] == "End of text."
        assert len(meta["sentences"]) == len(concepts)
        expected = np.stack([encoder.concept(sentence) for sentence in meta["sentences"]])
        assert np.array_equal(concepts, expected.astype(np.float16))
    shares = Counter(split for split, *_ in found)
    assert 3 <= shares["validation"] <= 24


def test_the_split_of_a_document_is_a_function_of_its_id_and_about_the_share_asked_for():
    splits = Counter(split_of(f"document-{number}", 0.05) for number in range(20_000))
    assert 900 < splits["validation"] < 1100
    # A larger share takes further documents and gives none back.
    first = {n for n in range(2000) if split_of(str(n), 0.1) == "validation"}
    assert first < {n for n in range(2000) if split_of(str(n), 0.2) == "validation"}


def test_two_runs_write_the_same_bytes(make_config, tmp_path):
    prepare(make_config(), HashEncoder())
    prepare(make_config(output=str(tmp_path / "again")), HashEncoder())
    assert written(tmp_path / "out") == written(tmp_path / "again")


@pytest.mark.parametrize("units_done", [0, 1, 3, 5])
def test_killed_and_started_again_it_ends_with_the_same_bytes(make_config, tmp_path, units_done):
    prepare(make_config(), HashEncoder())
    config = make_config(output=str(tmp_path / "killed"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen([sys.executable, SCRIPT, path, "0.2"], stdout=subprocess.DEVNULL)
    units = tmp_path / "killed/units.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done = len(units.read_text().splitlines()) if units.exists() else 0
        if done >= units_done and (tmp_path / "killed/prepare.lock").exists():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(InputError):
        open_dataset(tmp_path / "killed/train")  # what is not finished is no dataset
    prepare(config, HashEncoder())
    assert written(tmp_path / "killed") == written(tmp_path / "out")


def test_shards_of_a_unit_that_was_not_finished_are_made_again(make_config, tmp_path):
    config = make_config()
    prepare(config, HashEncoder())
    before = written(config.output)
    # As if the power had failed after the shards of the last unit were committed and before the unit was.
    out = Path(config.output)
    for split in ("train", "validation"):
        (out / split / "dataset.json").unlink()
    lines = (out / "units.jsonl").read_text().splitlines()
    (out / "units.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    encoder = HashEncoder()
    prepare(config, encoder)
    assert written(out) == before
    assert 0 < len(encoder.seen) < 60


def test_a_finished_dataset_is_said_to_be_there_and_not_made_again(make_config, capsys):
    config = make_config()
    prepare(config, HashEncoder())
    capsys.readouterr()
    encoder = HashEncoder()
    prepare(config, encoder)
    assert "already prepared" in capsys.readouterr().out
    assert encoder.seen == []


def test_another_config_is_refused_naming_what_differs(make_config):
    prepare(make_config(), HashEncoder())
    with pytest.raises(InputError) as caught:
        prepare(make_config(validation=0.3, sentences={"max_characters": 100}), HashEncoder())
    assert [line.split(": ")[1] for line in caught.value.mistakes] == ["sentences.max_characters", "validation"]


def test_a_second_process_on_the_folder_is_refused(make_config, tmp_path):
    config = make_config()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen([sys.executable, SCRIPT, path, "0.5"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/prepare.yaml").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(InputError, match="another process"):
            prepare(config, HashEncoder())
    finally:
        process.kill()
        process.wait()


def test_refused_documents_are_counted_by_reason(make_config, tmp_path):
    lines = [
        {"id": "good", "text": "One is here. Two is here."},
        {"id": "short", "text": "One alone."},
        {"id": "empty", "text": "  \n "},
        {"id": "good", "text": "Another one. With the same id."},
        {"id": "bad", "text": "This is fine. This is not a number."},
        {"id": "long", "text": "One is. Two is. Three is. Four is. Five is."},
        {"id": "fine", "text": "Three is here. Four is here. Five is here."},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(source={"name": "huggingface", "paths": [str(path)]}, validation=0, max_sentences=4)
    prepare(config, HashEncoder())
    source = open_dataset(tmp_path / "out/train").info.source
    assert source["given"] == 7
    assert source["kept"]["train"] == 2
    assert source["refused"] == {
        "duplicate_id": 1,
        "empty": 1,
        "not_finite": 1,
        "too_few_sentences": 1,
        "too_many_sentences": 1,
    }
    assert not (tmp_path / "out/validation").exists()


def test_a_sentence_that_repeats_in_a_unit_is_encoded_once(make_config):
    encoder = HashEncoder()
    prepare(make_config(), encoder)
    assert encoder.seen.count("This is a header.") == DOCUMENTS // 10


def test_the_normaliser_is_median_and_iqr_of_the_training_concepts(make_config):
    config = make_config()
    prepare(config, HashEncoder())
    concepts = np.concatenate([values for split, _, values in documents(config.output) if split == "train"])
    center, scale = read_normalizer(Path(config.output) / "train")
    low, middle, high = np.percentile(concepts.astype(np.float32), (25, 50, 75), axis=0)
    assert np.allclose(center, middle)
    assert np.allclose(scale, (high - low) * 0.7413)
    for one, other in zip((center, scale), read_normalizer(Path(config.output) / "validation"), strict=True):
        assert np.array_equal(one, other)


def test_nothing_to_train_on_is_an_error(make_config, tmp_path):
    (tmp_path / "lonely.txt").write_text("One sentence alone.")
    config = make_config(source={"name": "files", "paths": [str(tmp_path / "lonely.txt")]})
    with pytest.raises(InputError, match="1 too_few_sentences"):
        prepare(config, HashEncoder())


def test_webdataset_reads_what_was_written(make_config):
    config = make_config()
    prepare(config, HashEncoder())
    shards = sorted(str(path) for path in (Path(config.output) / "train").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    ours = [(meta, concepts) for split, meta, concepts in documents(config.output) if split == "train"]
    assert [sample["json"] for sample in samples] == [meta for meta, _ in ours]
    assert all(np.array_equal(sample["npy"], concepts) for sample, (_, concepts) in zip(samples, ours, strict=True))


def test_inspect_shows_both_splits_and_names_a_changed_shard(make_config, capsys):
    config = make_config()
    prepare(config, HashEncoder())
    capsys.readouterr()
    inspect(config.output, verify=True)
    out = capsys.readouterr().out
    assert out.count("as written") == 2
    assert "blake2b" in out
    shard = sorted((Path(config.output) / "train").glob("*.tar"))[2]
    content = bytearray(shard.read_bytes())
    content[650] ^= 1  # in the first concept: behind a tar header of 512 bytes and an .npy header of 128
    shard.write_bytes(content)
    inspect(config.output)  # without verify nothing is read again
    with pytest.raises(InputError, match=shard.name):
        inspect(config.output, verify=True)


def test_real_sentences_and_a_real_encoder(make_config, tmp_path):
    source = {"name": "sample", "take_sentences": 60}
    config = make_config(source=source, validation=0.0, documents_per_shard=5)
    prepare(config)
    dataset = open_dataset(tmp_path / "out/train")
    assert dataset.embed_dim == 384
    assert dataset.info.encoder["name"] == "sentence-transformers"
    norms = np.concatenate([np.linalg.norm(c.astype(np.float32), axis=1) for _, _, c in _train(dataset)])
    assert np.allclose(norms, 1, atol=1e-2)  # MiniLM's concepts have length 1


def _train(dataset):
    for index in range(len(dataset.shards)):
        shard = open_shard(dataset, index)
        yield from ((index, shard.keys[i], np.array(shard.concepts(i))) for i in range(len(shard)))


def test_mistakes_in_the_config_end_with_2_all_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"output": "x", "source": {"name": "smaple"}, "encodr": {}, "validation": 1.5}))
    command = [sys.executable, "-m", "lcm_ds.cli", "prepare", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert any("did you mean 'encoder'?" in line for line in lines)
    assert any("validation" in line and "1.5" in line for line in lines)
