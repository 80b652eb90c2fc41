"""Text → dataset: the same bytes however often it was killed, every document in one split, every refusal counted."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import yaml
from machine import patience
from preparing import HashEncoder, written
from runs import SUPPORT

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import open_dataset, read_normalizer, read_shards
from lcm_ds.data.shard import open_shard
from lcm_ds.distributed.environment import detect_environment
from lcm_ds.encoders import sentence_transformer
from lcm_ds.errors import InputError
from lcm_ds.files import sha256_of
from lcm_ds.prepare import pipeline
from lcm_ds.prepare.pipeline import prepare
from lcm_ds.prepare.state import split_of
from lcm_ds.prepare.texts import load_for_rank

DOCUMENTS = 60
SCRIPT = SUPPORT / "preparing.py"


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
            "split_workers": 0,
            **changes,
        }
        return PrepareConfig(**mapping)

    return make


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
        assert split == split_of(Path(meta["id"]).read_text(), config.validation)
        assert meta["sentences"][-1] == "End of text."
        assert len(meta["sentences"]) == len(concepts)
        expected = np.stack([encoder.concept(sentence) for sentence in meta["sentences"]])
        assert np.array_equal(concepts, expected.astype(np.float16))
    shares = Counter(split for split, *_ in found)
    assert 3 <= shares["validation"] <= 24


def test_a_document_without_an_id_keeps_its_split_wherever_it_is_found(texts, make_config, tmp_path, monkeypatch):
    """Spelt otherwise, in another folder, beside others, as rows of a file: what decides is the text."""
    monkeypatch.chdir(texts.parent)
    shutil.copytree(texts, tmp_path / "moved/deeper")
    (tmp_path / "moved/other.txt").write_text("This one came later. It is another.")
    rows = [{"text": path.read_text().replace(" ", "\r\n")} for path in sorted(texts.iterdir())]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files, rows = {"name": "files"}, {"name": "huggingface", "id_column": None}
    sources = [
        {**files, "paths": [str(texts / "*.txt")]},
        {**files, "paths": [f"{texts.name}/*.txt", str(texts / "0*.txt")]},  # named twice, there once
        {**files, "paths": [str(tmp_path / "moved/**/*.txt")]},
        {**rows, "paths": [str(tmp_path / "rows.jsonl")]},
    ]
    found = []
    for number, source in enumerate(sources):
        output = str(tmp_path / f"out-{number}")
        prepare(make_config(source=source, output=output), HashEncoder())
        found.append({" ".join(meta["sentences"]): split for split, meta, _ in documents(output)})
        assert len({meta["id"] for _, meta, _ in documents(output)}) == DOCUMENTS + (number == 2)
    found[2].pop("This one came later. It is another. End of text.")
    assert found[0] == found[1] == found[2] == found[3]
    assert set(found[0].values()) == {"train", "validation"}


@pytest.mark.parametrize("ids", [False, True])
def test_a_dataset_begun_with_other_rules_is_not_continued(make_config, tmp_path, ids):
    """Splits by path, which documents with ids of their own never had, and the former rules of sentences."""
    changes = {}
    if ids:
        rows = [{"id": f"story-{n}", "text": f"Story {n} begins. It ends."} for n in range(30)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes["source"] = {"name": "huggingface", "paths": [str(tmp_path / "rows.jsonl")]}
    prepare(make_config(**changes), HashEncoder())
    (tmp_path / "out/train/dataset.json").unlink()
    parts = json.loads((tmp_path / "out/parts.json").read_text())
    parts.pop("split", None)
    (tmp_path / "out/parts.json").write_text(json.dumps(parts))
    if ids:
        prepare(make_config(**changes), HashEncoder())
        (tmp_path / "out/train/dataset.json").unlink()
    del parts["sentences"]["rules"]
    (tmp_path / "out/parts.json").write_text(json.dumps(parts))
    with pytest.raises(InputError) as caught:
        prepare(make_config(**changes), HashEncoder())
    assert [line.split(": ")[1] for line in caught.value.errors] == ["sentences.rules"] + ["split"] * (not ids)


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


def prepare_and_be_killed(config, event):
    """Prepare in a process of its own that SIGKILL ends when it is about to open or rename file number `event` in the
    output folder; returns whether it came that far."""
    child = os.fork()
    if child == 0:
        left = event

        def kill(name, arguments):
            nonlocal left
            if name in ("open", "os.rename") and str(arguments[0]).startswith(config.output):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        try:
            prepare(config, HashEncoder())
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
def test_killed_before_any_of_its_writes_and_started_again_it_ends_with_the_same_bytes(make_config, texts, tmp_path):
    source = {"name": "files", "paths": [str(texts / "00*.txt")]}
    common = {"source": source, "documents_per_shard": 5, "validation": 0.7}  # documents of both splits in both units
    prepare(make_config(**common), HashEncoder())
    expected = written(tmp_path / "out")
    assert {"train/00000001.tar", "validation/00000001.tar"} <= expected.keys()
    event = 0
    while prepare_and_be_killed(config := make_config(**common, output=str(tmp_path / f"killed-{event}/out")), event):
        for split in ("train", "validation"):
            folder = Path(config.output) / split
            if (folder / "dataset.json").exists():
                open_dataset(folder)  # a dataset.json that exists is complete
        prepare(config, HashEncoder())
        assert written(config.output) == expected, f"killed at event {event}"
        event += 1
    assert event > 40  # the last time nothing was left to kill
    assert written(config.output) == expected


def test_killed_in_the_middle_of_encoding_it_goes_on_where_it_was(make_config, tmp_path, capsys):
    prepare(make_config(), HashEncoder())
    config = make_config(output=str(tmp_path / "killed"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen([sys.executable, SCRIPT, path, "0.3"], stdout=subprocess.DEVNULL)
    wait_for_units(tmp_path / "killed", 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(InputError, match="not a finished dataset"):
        open_dataset(tmp_path / "killed/train")
    capsys.readouterr()
    encoder = HashEncoder()
    prepare(config, encoder)
    assert "resuming after" in capsys.readouterr().out
    assert encoder.seen.count("This is a header.") <= 4  # of 6 units, each of which has this sentence
    assert written(tmp_path / "killed") == written(tmp_path / "out")


def wait_for_units(out, count):
    deadline = time.monotonic() + patience(60)
    while time.monotonic() < deadline:
        if (out / "units.jsonl").exists() and (out / "units.jsonl").read_text().count("\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{count} units were not done in a minute")


def test_shards_of_a_unit_that_was_not_finished_are_made_again(make_config, tmp_path, monkeypatch):
    config = make_config()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "remove_ids", lambda out: None)  # the last thing that a preparation does
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
    assert written(out) == {name: data for name, data in before.items() if not name.startswith("ids/")}
    assert 0 < len(encoder.seen) < 70  # the end-of-text and a unit


def test_a_finished_dataset_is_said_to_be_there_and_not_made_again(make_config, capsys):
    config = make_config()
    prepare(config, HashEncoder())
    capsys.readouterr()
    encoder = HashEncoder()
    prepare(config, encoder)
    assert "already prepared" in capsys.readouterr().out
    assert encoder.seen == []


def test_another_config_is_refused_naming_what_differs(make_config):
    encoder = {"name": "sentence-transformers", "model": "minilm"}
    prepare(make_config(), HashEncoder())
    changes = {"validation": 0.3, "sentences": {"max_characters": 100}, "encoder": {**encoder, "threads": 2}}
    with pytest.raises(InputError) as caught:
        prepare(make_config(**changes), HashEncoder())
    named = [line.split(": ")[1] for line in caught.value.errors]
    assert named == ["encoder.threads", "sentences.max_characters", "validation"]


@pytest.mark.slow
def test_openvino_gives_the_same_bytes_by_any_processes_and_a_dataset_keeps_the_backend_it_was_started_with(
    make_config, tmp_path, capfd, monkeypatch
):
    pytest.importorskip("openvino")
    for processes in (1, 2):
        prepare(make_config(output=str(tmp_path / f"by-{processes}"), processes=processes))
        printed = capfd.readouterr()
        assert f"encoding by OpenVINO: {DOCUMENTS} documents" in printed.out
        assert printed.err == ""
    one, two = (open_dataset(tmp_path / f"by-{processes}/train") for processes in (1, 2))
    assert one.info.encoder["backend"] == "openvino"
    assert one.shards == two.shards

    monkeypatch.setattr(sentence_transformer, "openvino_is_installed", lambda: False)
    begun = make_config(processes=1)
    prepare(begun)
    monkeypatch.undo()
    alone = detect_environment({})
    assert "backend" not in load_for_rank(begun, alone).describe()
    assert load_for_rank(make_config(output=str(tmp_path / "new")), alone).describe()["backend"] == "openvino"
    named = begun.encoder.model_dump()
    for same in (begun, make_config(encoder=named | {"backend": "torch"})):
        prepare(same)
        assert "already prepared" in capfd.readouterr().out
    with pytest.raises(InputError, match=r"encoder\.backend: was 'torch' when this dataset .* is now 'openvino'"):
        prepare(make_config(encoder=named | {"backend": "openvino"}))


@pytest.mark.parametrize("threads", [1, 3])
def test_it_encodes_with_as_many_threads_as_the_config_says_whatever_there_were_before(make_config, threads):
    class Counts(HashEncoder):
        def embed(self, batch):
            seen.add(torch.get_num_threads())
            return super().embed(batch)

    seen, before = set(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encoder = {"name": "sentence-transformers", "model": "minilm", "threads": threads}
        config = make_config(encoder=encoder)
        prepare(config, Counts())
        assert torch.get_num_threads() == 2  # of what comes after it in a notebook
    finally:
        torch.set_num_threads(before)
    assert seen == {threads}
    assert open_dataset(Path(config.output) / "train").info.threads == threads


def test_another_encoder_behind_the_same_config_is_refused_before_the_halves_are_mixed(make_config, tmp_path):
    class Fails(HashEncoder):
        """From story 30 on its device is broken."""

        def embed(self, batch):
            if any("story 30 " in text for text in self.seen):
                raise RuntimeError("device lost")
            return super().embed(batch)

        def encode(self, texts):
            if any("story 30 " in text for text in texts):
                raise RuntimeError("out of memory")
            return super().encode(texts)

    config = make_config()
    with pytest.raises(RuntimeError):
        prepare(config, Fails(revision="a"))
    with pytest.raises(InputError, match=r"encoder\.revision: was 'a' when this dataset was started and is now 'b'"):
        prepare(config, HashEncoder(revision="b"))
    prepare(config, HashEncoder(revision="a"))
    assert len(documents(config.output)) == DOCUMENTS


def test_texts_that_came_since_are_not_mixed_in(make_config, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/1.txt").write_text("A lone text. It is.")
    config = make_config(source={"name": "files", "paths": [str(tmp_path / "texts/*.txt")]}, validation=0)
    prepare(config, HashEncoder())
    (tmp_path / "out/train/dataset.json").unlink()
    (tmp_path / "texts/0.txt").write_text("And another. It is new.")
    with pytest.raises(InputError, match=r"texts/0\.txt: new since .*/out was started: remove it, or"):
        prepare(config, HashEncoder())


def test_a_folder_of_something_else_is_left_alone(make_config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty"):
        prepare(make_config(), HashEncoder())
    with pytest.raises(InputError, match="is a file"):
        prepare(make_config(output=str(tmp_path / "out/thesis.txt")), HashEncoder())
    with pytest.raises(InputError, match="cannot be made: Not a directory"):
        prepare(make_config(output=str(tmp_path / "out/thesis.txt/out")), HashEncoder())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_end_of_text_without_a_concept_is_refused_before_anything_is_encoded(make_config):
    encoder = HashEncoder()
    with pytest.raises(InputError, match=r"end_of_text: .* not finite"):
        prepare(make_config(end_of_text="This is not a number."), encoder)
    assert encoder.seen == ["This is not a number."]


def test_a_second_process_on_the_folder_is_refused(make_config, tmp_path):
    config = make_config()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen([sys.executable, SCRIPT, path, "0.5"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + patience(60)
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
        {"id": "short", "text": "Only one."},
        {"id": "empty", "text": "  \n "},
        {"id": "good", "text": "Another one. With the same id."},
        {"id": "bad", "text": "This is fine. This is not a number."},
        {"id": "long", "text": "One is. Two is. Three is. Four is. Five is."},
        {"id": "fine", "text": "Three is here. Four is here. Five is here."},
        {"id": "null", "text": None},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(source={"name": "huggingface", "paths": [str(path)]}, validation=0, max_sentences=4)
    prepare(config, HashEncoder())
    source = open_dataset(tmp_path / "out/train").info.source
    assert source["given"] == 8
    assert source["kept"]["train"] == 2
    assert source["refused"] == {
        "duplicate_id": 1,
        "empty": 2,
        "not_encoded": 1,
        "too_few_sentences": 1,
        "too_many_sentences": 1,
    }
    assert not (tmp_path / "out/validation").exists()


def test_a_sentence_that_repeats_in_a_unit_is_encoded_once(make_config):
    encoder = HashEncoder()
    prepare(make_config(), encoder)
    assert encoder.seen.count("This is a header.") == DOCUMENTS // 10


def test_the_normaliser_is_median_and_iqr_of_the_training_concepts_without_the_ends_of_text(make_config):
    config = make_config()
    prepare(config, HashEncoder())
    concepts = np.concatenate([values[:-1] for split, _, values in documents(config.output) if split == "train"])
    center, scale = read_normalizer(Path(config.output) / "train")
    low, middle, high = np.percentile(concepts.astype(np.float32), (25, 50, 75), axis=0)
    assert np.allclose(center, middle)
    assert np.allclose(scale, (high - low) * 0.7413)
    for one, other in zip((center, scale), read_normalizer(Path(config.output) / "validation"), strict=True):
        assert np.array_equal(one, other)


def test_int8_concepts_are_half_a_step_off_at_most(make_config, tmp_path):
    prepare(make_config(), HashEncoder())
    prepare(make_config(output=str(tmp_path / "int8"), dtype="int8"), HashEncoder())
    expected, small = documents(tmp_path / "out"), documents(tmp_path / "int8")
    assert [meta for _, meta, _ in small] == [meta for _, meta, _ in expected]
    info = open_dataset(tmp_path / "int8/train").info
    step = np.array(info.quantization.step)
    assert (step < 0.01).all()  # the numbers have a standard deviation of 0.05
    for (_, _, exact), (_, _, close) in zip(expected, small, strict=True):
        assert close.dtype == np.float16
        assert (np.abs(exact.astype(np.float64) - close) <= step / 2 + np.abs(exact) * 2**-10).all()
    shards = sorted(str(path) for path in (tmp_path / "int8/train").glob("*.tar"))
    samples = webdataset.WebDataset(shards, shardshuffle=False).decode()
    assert {sample["npy"].dtype.name for sample in samples} == {"int8"}


def test_nothing_to_train_on_is_an_error(make_config, tmp_path):
    (tmp_path / "lonely.txt").write_text("Only one sentence.")
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


@pytest.mark.slow
def test_ctrl_c_leaves_whole_things_only_and_the_real_encoder_goes_on(make_config, tmp_path, capsys):
    source = {"name": "sample", "take_sentences": 800}
    config = make_config(source=source, validation=0.0, documents_per_shard=1)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "lcm_ds.cli", "prepare", str(path)]
    # What runs in the background of a script inherits that SIGINT is ignored; at a terminal it is not.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, preexec_fn=heed)
    wait_for_units(tmp_path / "out", 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=patience(60))
    assert process.returncode == 75
    assert "start again to resume" in errors
    assert not [word for word in ("Traceback", "leaked", "resource_tracker") if word in errors], errors
    train = tmp_path / "out/train"
    assert not list(train.glob("*.partial"))
    assert all(sha256_of(train / shard.name) == shard.sha256 for shard in read_shards(train))
    prepare(config)
    assert "resuming after" in capsys.readouterr().out
    dataset = open_dataset(train)
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
