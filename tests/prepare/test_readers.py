"""Readers: texts are split and tokenized in other processes, and arrive as int32; one batch is always on the device."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading

import numpy as np
import psutil
import pytest
from machine import patience
from preparing import HashEncoder, written
from test_limits import config_of, write_lines

from lcm_ds.encoders import base, load_encoder
from lcm_ds.errors import RunFailedError
from lcm_ds.prepare import encode
from lcm_ds.prepare.pipeline import prepare
from lcm_ds.prepare.readers import Reader, Readers, WorkUnit, distinct, open_reader
from lcm_ds.prepare.state import SOURCE


class HashTokenizer:
    """HashEncoder's batches, with the process and the thread that made them."""

    def __call__(self, texts):
        batches = HashEncoder().tokenize(texts)
        for batch in batches:
            batch.inputs["maker"] = (os.getpid(), threading.current_thread().name)
        return batches


class Breaks(HashTokenizer):
    """Fails, or ends its process, at a certain sentence."""

    def __init__(self, sentence, dies=False):
        self.sentence, self.dies = sentence, dies

    def __call__(self, texts):
        if self.sentence in texts and self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.sentence in texts:
            raise ValueError("no such letter")
        return super().__call__(texts)


class Encoder(HashEncoder):
    """HashEncoder, its tokenizer as an object of its own."""

    def __init__(self, tokenizer):
        super().__init__()
        self.makers = set()
        self.batch_tokenizer = tokenizer

    def embed(self, batch):
        self.makers.add(batch.inputs.get("maker"))
        return super().embed(batch)


@pytest.fixture
def lines(tmp_path):
    return write_lines(tmp_path / "lines.jsonl", 100)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_texts_are_tokenized_where_they_are_split(lines, tmp_path, workers):
    encoder = Encoder(HashTokenizer())
    if workers == 0:
        encoder.tokenize = HashTokenizer()
    prepare(config_of(lines, tmp_path / "out", split_workers=workers), encoder)
    makers = encoder.makers - {None, (os.getpid(), "MainThread")}  # that of the end of text
    if workers:
        assert 1 <= len(makers) <= 2
        assert os.getpid() not in {process for process, _ in makers}
    else:
        assert makers == {(os.getpid(), "lcm-ds-tokenizer_0")}
    prepare(config_of(lines, tmp_path / "expected"), HashEncoder())
    assert written(tmp_path / "out") == written(tmp_path / "expected")


def test_an_encoder_without_a_tokenizer_of_its_own_tokenizes_in_a_thread(lines, tmp_path):
    encoder = Encoder(None)
    encoder.tokenize = HashTokenizer()
    prepare(config_of(lines, tmp_path / "out", split_workers=1), encoder)
    assert encoder.makers - {(os.getpid(), "MainThread")} == {(os.getpid(), "lcm-ds-tokenizer_0")}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_arrives_is_int32_and_the_same_from_a_process(lines, tmp_path, workers):
    config = config_of(lines, tmp_path / "out", split_workers=workers)
    (tmp_path / "out").mkdir()
    from lcm_ds.text.open import open_source

    source = open_source(config.source, config.sentences.language)
    (tmp_path / "out" / SOURCE).write_text(json.dumps(source.index()))
    encoder = load_encoder(config.encoder)
    readers = Readers(config)
    readers.start(encoder)
    unit = readers.submit(WorkUnit(1, 20, 40)).result()
    readers.close()
    documents = open_reader(config).read(WorkUnit(1, 20, 40))
    assert unit.documents == documents
    every = [sentence for document in documents for sentence in document.sentences]
    assert [unit.sentences[row] for row in unit.rows] == every
    assert unit.sentences == list(dict.fromkeys(every))
    expected = encoder.tokenize(unit.sentences)
    assert len(unit.batches) == len(expected) > 1
    for batch, other in zip(unit.batches, expected, strict=True):
        assert batch.inputs.keys() == other.inputs.keys()
        for array, same in zip([batch.rows, *batch.inputs.values()], [other.rows, *other.inputs.values()], strict=True):
            assert isinstance(array, np.ndarray)
            assert array.dtype == np.int32
            assert np.array_equal(array, same)
    assert unit.rows.dtype == np.int32


@pytest.mark.parametrize("workers", [0, 1])
def test_a_text_that_cannot_be_tokenized_costs_no_other(lines, tmp_path, workers):
    encoder = Encoder(Breaks("Sentence 2 of document 33 is no other's."))
    if workers == 0:
        encoder.tokenize = encoder.batch_tokenizer
        encoder.encode = HashEncoder().encode
    prepare(config_of(lines, tmp_path / "out", split_workers=workers), encoder)
    prepare(config_of(lines, tmp_path / "expected"), HashEncoder())
    assert written(tmp_path / "out") == written(tmp_path / "expected")


def test_a_process_that_dies_is_one_line_and_what_is_committed_stays(lines, tmp_path):
    config = config_of(lines, tmp_path / "out", split_workers=1)
    with pytest.raises(RunFailedError, match="a process that reads, splits and tokenizes has died") as caught:
        prepare(config, Encoder(Breaks("Sentence 2 of document 77 is no other's.", dies=True)))
    assert caught.value.exit_code == 1
    assert len(caught.value.errors) == 1
    done = (tmp_path / "out/units.jsonl").read_text().count("\n")
    assert done < 5
    prepare(config, Encoder(HashTokenizer()))
    prepare(config_of(lines, tmp_path / "expected"), HashEncoder())
    assert written(tmp_path / "out") == written(tmp_path / "expected")


class OfTheScript(HashTokenizer):
    """A class of the script that calls `prepare`; other processes do not import that."""

    __module__, __qualname__ = "__main__", "OfTheScript"


class Holder(HashTokenizer):
    """Holds another tokenizer."""

    def __init__(self, inside):
        self.inside = inside


def library_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), unk_token="?")


@pytest.mark.parametrize(
    ("attribute", "make"),
    [
        ("tokenizer", library_tokenizer),  # the encoder's own attribute, which is no `Tokenizer`
        ("batch_tokenizer", OfTheScript),
        pytest.param("batch_tokenizer", lambda: Holder(OfTheScript()), marks=pytest.mark.slow),
        pytest.param("batch_tokenizer", lambda: Holder(lambda texts: texts), marks=pytest.mark.slow),  # not pickled
    ],
)
def test_a_tokenizer_that_other_processes_cannot_take_leaves_it_to_a_thread(
    attribute, make, lines, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys.modules["__main__"], "OfTheScript", OfTheScript, raising=False)
    encoder = Encoder(None)
    encoder.tokenize = HashTokenizer()
    setattr(encoder, attribute, make())
    prepare(config_of(lines, tmp_path / "out", split_workers=1), encoder)
    assert encoder.makers - {(os.getpid(), "MainThread")} == {(os.getpid(), "lcm-ds-tokenizer_0")}
    prepare(config_of(lines, tmp_path / "expected"), HashEncoder())
    assert written(tmp_path / "out") == written(tmp_path / "expected")


def test_ctrl_c_does_not_reach_its_processes_while_they_start(lines, tmp_path):
    """It would print a traceback of what they import."""
    readers = Readers(config_of(lines, tmp_path / "out", split_workers=1))
    try:
        (process,) = readers._pool._processes
        with open(f"/proc/{process}/status") as status:
            blocked = int(re.search(r"SigBlk:\s*(\w+)", status.read())[1], 16)
        assert blocked >> (signal.SIGINT - 1) & 1
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        readers.close()


def test_no_process_stays_if_it_ends_before_the_tokenizers_are_taken(lines, tmp_path):
    """A large tokenizer, whose processes are still busy when all is over."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from preparing import HashEncoder\n"
        "from lcm_ds.config import PrepareConfig, load; from lcm_ds.prepare.readers import Readers\n"
        "encoder = HashEncoder(); encoder.batch_tokenizer = bytes(5_000_000)\n"
        "readers = Readers(load(PrepareConfig, sys.argv[2])); readers.start(encoder); readers.close()\n"
        "print('closed')\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(config_of(lines, tmp_path / "out", split_workers=2).model_dump(mode="json")))
    support = os.path.dirname(sys.modules["preparing"].__file__)
    command = [sys.executable, "-c", code, support, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "closed\n"


def test_lists_of_sentences_need_no_splitter(tmp_path):
    from lcm_ds.text.open import open_source

    lines = [{"id": "a", "given": ["It rains.", "It rains."], "rest": ["Rain."]}]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"name": "huggingface", "paths": [str(tmp_path / "lists.jsonl")]}
    config = config_of("", tmp_path, source={**source, "source_column": "given", "target_column": "rest"})

    def no_splitter():
        raise ModuleNotFoundError("spacy")

    reader = Reader(config, open_source(config.source), no_splitter)
    (document,) = reader.read(WorkUnit(0, 0, 1))
    assert document.sentences == ["It rains.", "It rains.", "[MODEL]:", "Rain."]
    unit = distinct(WorkUnit(0, 0, 1), [document])
    assert unit.sentences == ["It rains.", "[MODEL]:", "Rain."]
    assert unit.rows.tolist() == [0, 0, 1, 2]


# --- one batch on the device --------------------------------------------------------------------------------------


class LazyDevice(Encoder):
    """Concepts are there only once they were waited for, as on a GPU; the log is what the host did."""

    def __init__(self, monkeypatch):
        super().__init__(HashTokenizer())
        self.log = []
        device = self

        class PendingBatch(base.PendingBatch):
            def result(self):
                device.log.append(("wait", self.batch.inputs["texts"]))
                return super().result()

        monkeypatch.setattr(encode, "PendingBatch", PendingBatch)

    def embed(self, batch):
        self.log.append(("start", batch.inputs["texts"]))
        return super().embed(batch)


def test_a_batch_is_started_before_the_one_before_is_waited_for_also_between_units(lines, tmp_path, monkeypatch):
    encoder = LazyDevice(monkeypatch)

    class Ready(Readers):
        """Each unit is read before it is asked for."""

        def submit(self, unit):
            future = super().submit(unit)
            future.exception()
            return future

    monkeypatch.setattr("lcm_ds.prepare.texts.Readers", Ready)
    prepare(config_of(lines, tmp_path / "out"), encoder)
    steps = [step for step in encoder.log if step[1] != ["End of text."]]
    started = [texts for kind, texts in steps if kind == "start"]
    assert len(started) == 100  # five sentences each
    assert [texts for kind, texts in steps if kind == "wait"] == started
    assert [kind for kind, _ in steps] == ["start", *["start", "wait"] * 99, "wait"]


def test_a_unit_that_is_not_read_yet_leaves_nothing_on_the_device(lines, tmp_path, monkeypatch):
    encoder = LazyDevice(monkeypatch)
    waiting = []

    class Slow(Readers):
        def submit(self, unit):
            future = super().submit(unit)
            future.done = lambda: False
            result = future.result
            future.result = lambda *a: (waiting.append(len([k for k, _ in encoder.log if k == "start"])), result(*a))[1]
            return future

    monkeypatch.setattr("lcm_ds.prepare.texts.Readers", Slow)
    prepare(config_of(lines, tmp_path / "out"), encoder)
    kinds = "".join(kind[0] for kind, texts in encoder.log if texts != ["End of text."])
    assert re.fullmatch(r"(s(sw){19}w){5}", kinds)


def test_an_error_that_shows_only_when_a_result_is_waited_for_is_of_its_batch(lines, tmp_path, monkeypatch):
    encoder = LazyDevice(monkeypatch)
    result = encode.PendingBatch.result

    def fails(embedding):
        if "Sentence 2 of document 33 is no other's." in embedding.batch.inputs["texts"]:
            raise RuntimeError("device-side assert")
        return result(embedding)

    monkeypatch.setattr(encode.PendingBatch, "result", fails)
    prepare(config_of(lines, tmp_path / "out"), encoder)
    prepare(config_of(lines, tmp_path / "expected"), HashEncoder())
    assert written(tmp_path / "out") == written(tmp_path / "expected")


class Large(HashTokenizer):
    """More than a pipe holds."""

    def __init__(self):
        self.data = bytes(1_000_000)


def test_nothing_of_it_is_left_when_it_is_done(lines, tmp_path, monkeypatch):
    """Also with more processes than units, some of which take no tokenizer."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    left = []
    for run in range(2):  # the first one starts what stays, such as multiprocessing's resource tracker
        config = config_of(write_lines(tmp_path / f"{run}.jsonl", 20), tmp_path / f"{run}", split_workers=2)
        prepare(config, Encoder(Large()))
        children = [process.pid for process in psutil.Process().children(recursive=True)]
        left.append((children, threading.enumerate(), sorted(os.listdir("/proc/self/fd"))))
    assert left[0] == left[1]
    assert not [thread for thread in left[1][1] if thread.name.startswith(("lcm-ds-", "Queue"))]
    assert not list((tmp_path / "temporary").iterdir())
