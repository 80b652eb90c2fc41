"""TensorBoard and the trackers: each step appears once; samples are what the model predicts."""

import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from unittest.mock import patch

import numpy as np
import pytest
import tensorboard.util.tensor_util as tensors
import torch
from machine import patience
from PIL import Image
from runs import ROOT, finish, metrics, run_dir, start
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lcm_ds.checkpoint.format import load_model
from lcm_ds.data.format import open_dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.errors import InputError
from lcm_ds.generate.retrieval import nearest_sentences
from lcm_ds.metrics import LOGGED
from lcm_ds.train.job_builder import build_job
from lcm_ds.train.monitoring import trackers
from lcm_ds.train.monitoring.metrics_log import tag_of
from lcm_ds.train.monitoring.tensorboard import CURVES, LAYOUT, TensorBoardWriter, sample_markdown
from lcm_ds.train.monitoring.text_samples import Sample
from lcm_ds.train.monitoring.trackers import Trackers

GROUPS = {"loss", "optim", "data", "speed", "memory", "val", "checkpoint"}


def read(folder):
    """Everything in the event files of a folder, as read by TensorBoard's fast loader, which purges nothing."""
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}, purge_orphaned_data=False).Reload()


def tags(board, plugin):
    """The tags of a kind, such as scalars."""
    return set(board.PluginTagToContent(plugin))


def steps(board, tag):
    return [event.step for event in board.Tensors(tag)]


def values(board, tag):
    return {event.step: tensors.make_ndarray(event.tensor_proto) for event in board.Tensors(tag)}


@pytest.fixture(scope="module")
def logged(make_config):
    """A run of 12 steps with all that is logged."""
    config = make_config(
        steps=12,
        checkpoint={"every": 4, "keep": 3},
        evaluate={"every": 4, "rows": 16},
        log={"every": 2, "histograms": 3, "samples": 2},
    )
    code, out, err = finish(start("launch", "--local", 2, config))
    assert code == 0, out + err
    return config


@pytest.fixture(scope="module")
def resumed(logged):
    """The same run, which lost its last two checkpoints and was resumed from step 4."""
    for step in (8, 12):
        shutil.rmtree(run_dir(logged) / f"checkpoints/step_{step:08d}")
    code, out, err = finish(start("launch", "--local", 2, logged))
    assert code == 0, out + err
    return logged


@pytest.mark.slow
def test_tensorboard_holds_each_step_of_a_resumed_run_once(resumed):
    board = read(run_dir(resumed) / "tensorboard")
    assert {tag.partition("/")[0] for tag in tags(board, "scalars")} == GROUPS
    assert steps(board, "loss/train") == [2, 4, 6, 8, 10, 12]
    assert steps(board, "loss/validation") == [4, 8, 12]
    assert values(board, "loss/train") == pytest.approx(metrics(resumed, "loss"))
    assert {tag.partition("/")[0] for tag in tags(board, "histograms")} == {"weights", "gradients"}
    for tag in tags(board, "histograms"):
        assert steps(board, tag) == [3, 6, 9, 12]
    assert tags(board, "text") == {f"samples/{number}/text_summary" for number in range(2)}
    for tag in tags(board, "text"):
        assert steps(board, tag) == [4, 8, 12]
    for tag in ("_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"):
        assert len(board.Tensors(tag)) == 1
    assert len(board.Tensors("custom_scalars__config__")) == 1


def test_each_curve_of_the_mse_chart_is_a_run_with_its_name(logged):
    folder = run_dir(logged) / "tensorboard"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(CURVES.values())
    assert set(CURVES.values()) == {"training", "model", "mean of targets", "best ridge"}
    full = read(folder)
    for tag, curve in CURVES.items():
        assert values(read(folder / curve), "mse") == values(full, tag)
    (charts,) = LAYOUT.values()
    patterns = [pattern for _, (pattern,) in charts.values()]  # one tag in each chart: its title names it
    tags_of_all = {"mse", *tags(full, "scalars")}
    for pattern in patterns:
        matching = [tag for tag in tags_of_all if re.match(pattern, tag)]
        assert len(matching) <= 1, pattern
        assert matching or pattern == "speed/mfu$"  # the peak of a CPU is unknown


def test_a_resume_with_another_grid_leaves_no_point_of_a_later_step(tmp_path):
    for first, on in ((0, range(1, 11)), (4, (6, 12))):
        board = TensorBoardWriter(tmp_path, {}, first)
        for step in on:
            board.scalars(step, {"loss/train": 1.0})
            if (first, step) == (0, 7):
                board.scalars(step, {"checkpoint/stall_seconds": 1.0})
        board.close(done=False)
        if first == 0:  # what a crash cuts short
            (written,) = (path for path in tmp_path.glob("*tfevents*") if not path.name.endswith(".about"))
            written.write_bytes(written.read_bytes()[:-3])
    found = read(tmp_path)
    assert steps(found, "loss/train") == [1, 2, 3, 4, 6, 12]
    assert "checkpoint/stall_seconds" not in tags(found, "scalars")
    assert steps(read(tmp_path / "training"), "mse") == [1, 2, 3, 4, 6, 12]
    assert not list(tmp_path.rglob("*.partial"))


def test_hparams_are_the_numbers_of_the_config(logged):
    board = read(run_dir(logged) / "tensorboard")
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert started["optim.lr"].number_value == 2.0e-3
    assert started["batch.rows_per_step"].number_value == 8
    assert started["ranks"].number_value == 2
    assert started["precision"].string_value == "float32"
    assert started["model.hidden_size"].number_value == 32


@torch.no_grad()
def test_samples_show_the_sentence_that_is_nearest_to_what_the_model_predicts(logged, concepts):
    board = read(run_dir(logged) / "tensorboard")
    model, _, _ = load_model(run_dir(logged), 12)
    dataset = open_dataset(concepts["validation"])
    shard = open_shard(dataset, 0)
    long_enough = [document for document in range(len(shard)) if shard.lengths[document] > 2]
    for number, document in enumerate(long_enough[:2]):
        meta, vectors = shard.meta(document), torch.from_numpy(shard.concepts(document).astype(np.float32))
        length = min(8, len(vectors) - 2)
        predicted = model.normalizer.denormalize(model(vectors[None, :length]))[0, -1]
        (expected,) = nearest_sentences(predicted.numpy()[None], [dataset])
        shown = values(board, f"samples/{number}/text_summary")[12]
        text = shown.item().decode().replace("\\", "")
        assert meta["id"] in text
        assert f"… {meta['sentences'][length - 1]}" in text
        assert f": {meta['sentences'][length]}\n" in text
        assert text.endswith(f"**nearest to the prediction** (cosine {expected.cosine:.3f}): {expected.text}")


def test_a_dataset_without_sentences_has_no_samples_and_0_turns_them_off(make_config, concepts, tmp_path):
    bare = shutil.copytree(concepts["validation"], tmp_path / "bare")
    info = json.loads((bare / "dataset.json").read_text())
    (bare / "dataset.json").write_text(json.dumps({**info, "texts": "json:words"}))
    data = {"train": str(concepts["train"]), "validation": str(bare), "row_length": 32, "max_segment": 16}
    config = make_config(steps=2, data=data)
    code, out, err = finish(start("train", config))
    assert code == 0, out + err
    assert err == ""
    board = read(run_dir(config) / "tensorboard")
    assert "loss/validation" in tags(board, "scalars")
    with pytest.raises(KeyError):
        tags(board, "text")


def test_error_by_position_is_a_figure_with_gaps_where_there_is_no_target(tmp_path):
    board = TensorBoardWriter(tmp_path, {"seed": 1}, start=0)
    board.errors(5, [0.9, None, 0.7])
    board.close(done=False)
    found = read(tmp_path)
    ((step, picture),) = values(found, "val/error_by_position").items()
    assert step == 5
    assert [int(size) for size in picture[:2]] == [700, 400]
    assert Image.open(io.BytesIO(picture[2])).size == (700, 400)
    assert "_hparams_/session_end_info" not in found.Tags()["tensors"]


def test_sentences_are_escaped():
    sample = Sample("a_b", ["# one", "*two*"], "<b>three</b>", "[four](x)", 0.5, 0.4, 3)
    text = sample_markdown(sample)
    for letters in ("\\# one", "\\*two\\*", "\\<b\\>three\\</b\\>", "\\[four\\]\\(x\\)", "rank 3", "*a\\_b*"):
        assert letters in text


def test_numbers_of_a_validation_have_tags_and_other_keys_do_not():
    assert tag_of("val_loss_of_mean") == "loss/validation_of_mean"
    assert tag_of("val_loss_of_ridge") == "loss/validation_of_ridge"
    assert tag_of("val_batch_mrr") == "val/batch_mrr"
    assert tag_of("val_anything") == "val/anything"
    assert tag_of("losses") is None


def test_the_table_of_metrics_has_every_key_of_the_metrics(logged):
    lines = (run_dir(logged) / "metrics.jsonl").read_text().splitlines()
    keys = {key for line in lines for key in json.loads(line)}
    assert {"loss", "val_loss", "checkpoint_time"} <= keys
    assert keys <= set(LOGGED)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_curves(logged, tmp_path):
    command = [sys.executable, ROOT / "docs" / "tensorboard_screenshot.py", run_dir(logged), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tensorboard.png", "tensorboard_scalars.png"}


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_an_error_before_the_run(make_config, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = make_config(log={"wandb": {"project": "p"}, "mlflow": {"tracking_uri": "x"}, "prometheus": "x.prom"})
    with pytest.raises(InputError) as refused:
        build_job(config, [], 1)
    assert [line.partition(": ")[2] for line in refused.value.errors] == [
        "log.wandb: the package wandb is not installed: pip install 'lcm-ds[wandb]'",
        "log.mlflow: the package mlflow is not installed: pip install 'lcm-ds[mlflow]'",
        "log.prometheus: the package prometheus_client is not installed: pip install 'lcm-ds[prometheus]'",
    ]


def log_of(make_config, **blocks):
    config = make_config(log=blocks)
    return build_job(config, [], 1).config.log


def track(log, folder, steps):
    found = Trackers(log, folder, {"optim.lr": 0.5})
    for step in steps:
        found.scalars(step, {"loss/train": 10.0 - step})
    assert found._ready.wait(patience(60))  # on a busy machine wandb starts in half a minute
    with patch.object(trackers, "CLOSE_SECONDS", patience(60)):
        found.close(done=True)
    return json.loads((folder / "trackers.json").read_text())


def test_mlflow_has_the_scalars_of_a_resumed_run_under_one_id(make_config, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
    uri = (tmp_path / "store").as_uri()
    log = log_of(make_config, mlflow={"tracking_uri": uri, "experiment": "lcm"})
    ids = track(log, tmp_path, [1, 2])
    assert track(log, tmp_path, [3]) == ids
    client = mlflow.MlflowClient(uri)
    run = client.get_run(ids["mlflow"])
    assert run.data.params == {"optim.lr": "0.5"}
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert {metric.step: metric.value for metric in history} == {1: 9.0, 2: 8.0, 3: 7.0}


def test_prometheus_has_a_file_of_the_last_values(make_config, tmp_path):
    from prometheus_client.parser import text_string_to_metric_families

    path = tmp_path / "textfile" / "lcm.prom"
    track(log_of(make_config, prometheus=str(path)), tmp_path, [1, 2])
    families = {family.name: family for family in text_string_to_metric_families(path.read_text())}
    values = {name: family.samples[0].value for name, family in families.items()}
    assert abs(values.pop("lcm_ds_reported") - time.time()) < patience(60)
    assert values == {"lcm_ds_step": 2, "lcm_ds_loss_train": 8.0, "lcm_ds_running": 0}
    assert families["lcm_ds_loss_train"].samples[0].labels == {"run": str(tmp_path)}
    assert families["lcm_ds_loss_train"].documentation.startswith("mean squared error of the last step")
    assert [each.name for each in path.parent.iterdir()] == ["lcm.prom"]


def test_a_server_that_does_not_answer_is_named_and_delays_the_end_by_seconds(make_config, tmp_path, caplog):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts connections and never answers
        log = log_of(make_config, mlflow={"tracking_uri": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        found = Trackers(log, tmp_path, {})
        found.scalars(1, {"loss/train": 1.0})
        started = time.monotonic()
        found.close(done=True)
        assert time.monotonic() - started < trackers.SHORT_CLOSE_SECONDS + 1
    assert "log.mlflow: no answer" in caplog.text


def wandb_records(data):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield record
            record = b""


def test_wandb_has_the_scalars_of_a_resumed_run_under_one_id(make_config, tmp_path):
    from wandb.proto import wandb_internal_pb2

    log = log_of(make_config, wandb={"project": "lcm", "mode": "offline"})
    ids = track(log, tmp_path, [1, 2])
    assert track(log, tmp_path, [3]) == ids

    def logged():
        found = {}
        for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
            assert ids["wandb"] in path.name
            for data in wandb_records(path.read_bytes()):
                history = wandb_internal_pb2.Record.FromString(data).history
                items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
                if "step" in items:
                    found[items["step"]] = items["loss/train"]
        return found

    deadline = time.monotonic() + patience(20)
    while len(logged()) < 3 and time.monotonic() < deadline:  # its own process writes the file
        time.sleep(0.1)
    assert logged() == {1: 9.0, 2: 8.0, 3: 7.0}


def test_a_tracker_that_fails_is_reported_and_not_used_any_further(make_config, tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no\nanswer")

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(trackers.KINDS, "mlflow", refuse)
    assert track(log_of(make_config, mlflow={"tracking_uri": "x"}), tmp_path, [1, 2]) == {}
    assert caplog.messages == ["log.mlflow: disabled for this run: no answer"]
