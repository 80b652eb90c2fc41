"""datatrove's executors make the dataset that `prepare` alone makes, from any number of tasks, killed ones included."""

import os
import signal
import subprocess
import sys
import time

import pytest
from machine import patience
from preparing import SECONDS, HashEncoder, written
from runs import SUPPORT

from lcm_ds.errors import InputError
from lcm_ds.prepare import pipeline, shares
from lcm_ds.prepare.shares import finish_shares, make_share

pytest.importorskip("datatrove", reason="needs the extra datatrove")
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.writers import JsonlWriter
from hash_on_datatrove import HashConcepts

from lcm_ds.integrations.datatrove import EncodeConcepts, FinishDataset

KILLED = """
import sys; sys.path.insert(0, sys.argv[1])
from datatrove.executor import LocalPipelineExecutor
from hash_on_datatrove import HashConcepts
LocalPipelineExecutor([HashConcepts(sys.argv[2])], tasks=3, workers=1, logging_dir=sys.argv[3]).run()
"""


@pytest.fixture
def hash_encoder(monkeypatch):
    """In this process."""
    monkeypatch.setattr("lcm_ds.prepare.texts.load_encoder", lambda config: HashEncoder())


def reports(folder):
    return sorted(path.stem for path in (folder / "reports").glob("*[0-9].json"))


@pytest.mark.slow
def test_tasks_of_the_local_executor_one_of_them_killed_make_what_prepare_makes(config, tmp_path):
    pipeline.prepare(config("alone", dtype="int8"), HashEncoder())
    ours, logs = config("ours", dtype="int8"), str(tmp_path / "logs")
    environ = {**os.environ, SECONDS: "0.1"}
    command = [sys.executable, "-c", KILLED, str(SUPPORT), f"{tmp_path}/ours.yaml", logs]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + patience(60)
    while len(reports(tmp_path / "ours")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # with the manager that datatrove starts
    process.wait()
    before = reports(tmp_path / "ours")
    assert len(before) < 12
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "ours/reports").glob(f"{before[0]}.json")}
    encode = LocalPipelineExecutor([HashConcepts(ours)], tasks=3, workers=2, logging_dir=logs)
    encode.run()
    assert len(reports(tmp_path / "ours")) == 12
    assert kept == {path: path.stat().st_mtime_ns for path in kept}  # what was made is not made again
    finish = LocalPipelineExecutor([FinishDataset(ours)], logging_dir=str(tmp_path / "finish"), depends=encode)
    finish.run()
    assert written(tmp_path / "ours") == written(tmp_path / "alone")


@pytest.mark.usefixtures("hash_encoder")
def test_units_that_tasks_have_made_are_taken_up_by_prepare(config, tmp_path, capsys):
    pipeline.prepare(config("alone"), HashEncoder())
    ours = config("ours")
    make_share(ours, 1, 3)
    assert reports(tmp_path / "ours") == [f"{unit:08d}" for unit in range(1, 12, 3)]
    damaged = next((tmp_path / "ours/train").glob("00000004.tar"))
    damaged.write_bytes(damaged.read_bytes()[:-1])  # is made again
    encoder = HashEncoder()
    pipeline.prepare(ours, encoder)
    assert "encoding: 72 documents" in capsys.readouterr().out
    assert written(tmp_path / "ours") == written(tmp_path / "alone")


@pytest.mark.usefixtures("hash_encoder")
def test_the_end_of_a_source_of_unknown_length_is_found_by_every_task(config, tmp_path, monkeypatch):
    pipeline.prepare(config("alone"), HashEncoder())

    def endless(*arguments):
        source = open_source(*arguments)
        kind = type(source)
        source.__class__ = type("Endless", (kind,), {"total": None, "units": lambda self, size: even_units(None, size)})
        return source

    from lcm_ds.prepare import readers, texts
    from lcm_ds.text.base import even_units
    from lcm_ds.text.open import open_source

    for module in (shares, readers, texts):
        monkeypatch.setattr(module, "open_source", endless)
    ours = config("ours")
    make_share(ours, 0, 2)
    with pytest.raises(InputError, match=r"unit 1 \(documents 8 to 15\) is not made: run the tasks that failed again"):
        finish_shares(ours)
    make_share(ours, 1, 2)
    finish_shares(ours)
    assert {**written(tmp_path / "ours"), "source.json": b""} == {**written(tmp_path / "alone"), "source.json": b""}


@pytest.mark.usefixtures("hash_encoder")
def test_a_dataset_is_finished_once_all_tasks_have_ended(config, tmp_path):
    ours = config("ours")
    with pytest.raises(InputError, match="no task has made units of it"):
        finish_shares(ours)
    make_share(ours, 0, 2)
    with pytest.raises(InputError, match=r"unit 1 \(documents 8 to 15\) is not made"):
        finish_shares(ours)
    with pytest.raises(InputError, match=r"encoder\.model"):
        make_share(config("ours", encoder={"name": "sentence-transformers", "model": "other"}), 1, 2)
    make_share(ours, 1, 2)
    finish_shares(ours)
    make_share(ours, 1, 2)  # finds it finished
    assert not (tmp_path / "ours/reports").exists()


def test_what_is_no_step_of_its_own_is_refused(config):
    ours = config("ours")
    step = EncodeConcepts(ours)
    with pytest.raises(InputError, match=r"EncodeConcepts has to be the first step of a pipeline: .* JsonlWriter"):
        step(iter([Document("text", "id")]), 0, 1)
    with pytest.raises(InputError, match="FinishDataset: tasks=2: has to be 1"):
        FinishDataset(ours)(None, 0, 2)
    with pytest.raises(InputError, match="documents_per_shard"):
        EncodeConcepts(f"{ours.output}.yaml", "documents_per_shard=0")


@pytest.mark.usefixtures("hash_encoder")
def test_the_files_of_a_pipeline_are_the_source_of_the_next(config, tmp_path):
    """As FineWeb's pipelines end: compressed JSONL, a file for each task, whatever their number."""
    texts = [Document(f"Text {n} begins. It ends.", f"t{n}", metadata={"url": f"u{n}"}) for n in range(20)]
    for rank in range(2):
        with JsonlWriter(str(tmp_path / "filtered")) as writer:
            for document in texts[rank * 10 : rank * 10 + 10]:
                writer.write(document, rank=rank)
    ours = config("ours", source={"name": "huggingface", "paths": [f"{tmp_path}/filtered/*.jsonl.gz"]})
    step = EncodeConcepts(ours)
    step(None, 0, 1)
    FinishDataset(ours)(None, 0, 1)
    assert step.stats["documents"].total == 20
    assert (tmp_path / "ours/train/dataset.json").exists()
