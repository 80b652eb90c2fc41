"""Checkpoints on an object store: complete there or not there, and fetched where a run has none."""

import json
import logging
import shutil
import time
from threading import Event

import pytest
from machine import patience
from runs import finish, metrics, run_dir, start

from lcm_ds.checkpoint import remote as copies
from lcm_ds.checkpoint.remote import Uploader, fetch_newest, steps, upload, why_not_writable
from lcm_ds.config import CheckpointConfig
from lcm_ds.data.remote import fetch
from lcm_ds.errors import RunFailedError, TransientError
from lcm_ds.files import sha256_of


def save(run, step, text="weights"):
    """A checkpoint of two files."""
    folder = run / f"checkpoints/step_{step:08d}"
    (folder / "offloaded").mkdir(parents=True)
    files = {}
    for name in ("model.pt", "offloaded/rank00.bin"):
        path = folder / name
        path.write_text(f"{text} {step} {name}")
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / "COMPLETE").write_text(json.dumps({"files": files}))
    return folder


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    """A folder on this machine's disk, or on an S3 server."""
    if request.param == "file":
        return (tmp_path / "there").as_uri()
    request.getfixturevalue("s3").client().create_bucket(Bucket="runs")
    return "s3://runs/small"


def text_of(url, step, name):
    return fetch.read_bytes(f"{url}/step_{step:08d}/{name}").decode()


def test_what_is_kept_here_is_kept_there_and_complete(url, tmp_path):
    run, rules = tmp_path / "run", CheckpointConfig(dir=url, keep=2, keep_every=20)
    assert steps(url) == []
    for step in (10, 20, 30, 40, 50):
        folder = save(run, step)
        assert upload(run, rules, Event())
        assert text_of(url, step, "COMPLETE") == (folder / "COMPLETE").read_text()
        assert text_of(url, step, "offloaded/rank00.bin") == f"weights {step} offloaded/rank00.bin"
        for old in sorted((run / "checkpoints").iterdir())[:-2]:
            shutil.rmtree(old)
    assert steps(url) == [20, 40, 50]
    assert fetch.names(url) == [f"step_{step:08d}" for step in (20, 40, 50)]


def test_a_checkpoint_that_is_saved_again_takes_the_place_of_the_former(url, tmp_path):
    run, rules = tmp_path / "run", CheckpointConfig(dir=url)
    shutil.rmtree(save(run, 10))
    save(run, 10)
    assert upload(run, rules, Event())
    shutil.rmtree(run)
    save(run, 10, "other weights")
    assert upload(run, rules, Event())
    assert text_of(url, 10, "model.pt") == "other weights 10 model.pt"
    assert steps(url) == [10]


def test_an_upload_that_was_cut_short_is_not_there_and_is_made_again(url, tmp_path, monkeypatch):
    run, rules = tmp_path / "run", CheckpointConfig(dir=url)
    save(run, 10)
    put = fetch.upload

    def cut(source, target, stopped=None):
        if target.endswith("COMPLETE"):
            raise fetch.Stopped
        put(source, target, stopped)

    monkeypatch.setattr(fetch, "upload", cut)
    with pytest.raises(fetch.Stopped):
        upload(run, rules, Event())
    assert "model.pt" in fetch.names(f"{url}/step_00000010")
    assert steps(url) == []
    monkeypatch.setattr(fetch, "upload", put)
    assert upload(run, rules, Event())
    assert steps(url) == [10]


def test_the_rest_of_an_upload_whose_checkpoint_is_gone_is_removed(url, tmp_path):
    fetch.write_bytes(f"{url}/step_00000005/model.pt", b"weights")
    fetch.write_bytes(f"{url}/notes/mine.txt", b"no checkpoint")
    save(tmp_path / "run", 10)
    assert upload(tmp_path / "run", CheckpointConfig(dir=url), Event())
    assert fetch.names(url) == ["notes", "step_00000010"]


def test_a_checkpoint_that_is_deleted_before_it_is_uploaded_is_left_out(url, tmp_path, monkeypatch):
    run, rules = tmp_path / "run", CheckpointConfig(dir=url)
    folder, put = save(run, 10), fetch.upload
    save(run, 20)

    def late(source, target, stopped=None):
        put(source, target, stopped)
        shutil.rmtree(folder, ignore_errors=True)

    monkeypatch.setattr(fetch, "upload", late)
    assert not upload(run, rules, Event())
    assert steps(url) == [20]
    assert fetch.names(url) == ["step_00000020"]


def test_a_place_where_nothing_may_be_written_is_refused(s3, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    reason = why_not_writable((tmp_path / "file/run").as_uri())
    assert reason is not None
    assert reason.startswith(f"checkpoint.dir: file://{tmp_path}/file/run/lcm-ds-may-write: cannot be written: ")
    assert "cannot be written" in (why_not_writable("s3://no-such-bucket/run") or "")
    s3.client().create_bucket(Bucket="runs")
    assert why_not_writable("s3://runs/run") is None
    assert fetch.names("s3://runs/run") == []


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_uploads_go_on_after_an_outage(s3, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(copies, "RETRY_SECONDS", 0.5)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    run, url = tmp_path / "run", "s3://runs/small"
    s3.client().create_bucket(Bucket="runs")
    uploader = Uploader(run, CheckpointConfig(dir=url))
    save(run, 10)
    s3.stop()
    with caplog.at_level(logging.ERROR):
        uploader.wake()
        deadline = time.monotonic() + patience(60)
        while not (errors := messages(caplog)) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert errors[0].startswith(f"checkpoint.dir: {url}: cannot be read, tried 2 times: ")
    s3.start()
    save(run, 20)
    uploader.wake()
    uploader.close(patience(60))
    assert steps(url) == [10, 20]


def test_without_an_answer_a_run_goes_on_from_what_is_here_and_does_not_start_over(tmp_path, monkeypatch, caplog):
    def no_answer(url, stopped=None):
        raise TransientError(f"{url}: cannot be read, tried 8 times: no answer")

    monkeypatch.setattr(fetch, "names", no_answer)
    monkeypatch.setattr(copies.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(copies, "from_first", lambda value: value)
    rules = CheckpointConfig(dir="s3://runs/a")
    with pytest.raises(RunFailedError, match="s3://runs/a: cannot be read, tried 8 times"):
        fetch_newest(tmp_path, rules, print)
    save(tmp_path, 10)
    fetch_newest(tmp_path, rules, print)
    assert messages(caplog)[-1].endswith("no answer; the run goes on from its checkpoint of step 10")


@pytest.mark.slow
def test_a_run_goes_on_from_what_was_uploaded(s3, make_config):
    s3.client().create_bucket(Bucket="runs")
    changes = {"optim": {"lr": 2.0e-3, "schedule": {"name": "constant"}}, "evaluate": {"every": None}, "steps": 8}
    there = {"every": 4, "keep": 1, "dir": "s3://runs/a"}
    straight, config = make_config(**changes), make_config(**changes, checkpoint=there)
    assert finish(start("launch", "--local", 2, straight))[0] == 0
    code, out, err = finish(start("launch", "--local", 2, config, "steps=4"))
    assert code == 0, out + err
    assert steps("s3://runs/a") == [4]
    assert fetch.names("s3://runs/a") == ["step_00000004"]

    folder = run_dir(config) / "checkpoints"
    shutil.rmtree(folder)
    # What was fetched before an interruption is not fetched again; what is damaged is.
    kept = folder / "step_00000004.fetched"
    kept.mkdir(parents=True)
    (kept / "state.json").write_bytes(b"{}")
    code, out, err = finish(start("launch", "--local", 2, config))
    assert code == 0, out + err
    assert "step 4 of 8" in out
    assert metrics(config, "loss") == metrics(straight, "loss")
    assert steps("s3://runs/a") == [8]
    assert [path.name for path in sorted(folder.glob("step_*"))] == ["step_00000008"]
