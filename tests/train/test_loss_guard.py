"""Steps that go wrong: skipped on all ranks, logged with their documents, rolled back; and a run that hangs."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from machine import patience
from runs import ROOT, finish, metrics, run_dir, start

from lcm_ds.config import GuardConfig
from lcm_ds.data.format import commit, open_dataset
from lcm_ds.data.format import finish as finish_dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.train.engine import skip_nonfinite_steps
from lcm_ds.train.reliability.loss_guard import StepMonitor
from lcm_ds.train.trace import trace

MARK = np.full(4, 12344, np.float16)
CHECKPOINT = {"every": 5, "keep": 10}


STEPS = 19  # of an epoch of the dataset, 4,767 concepts in steps of 256


def start_faulty(config, fault):
    """A run of two ranks in which one has a fault (faulty_worker.py)."""
    command = [sys.executable, str(Path(__file__).with_name("faulty_worker.py")), str(config), fault]
    launcher = f"import sys; from lcm_ds.distributed.workers import run_local; sys.exit(run_local({command!r}, 2))"
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", launcher], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def incidents(config):
    path = run_dir(config) / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def with_a_mark(concepts):
    """`damaged` replaces it by NaNs, which cannot be written."""
    concepts[-1, :4] = MARK
    return concepts


def document_of(config, step):
    """The id of a document that the run reads only in that step."""
    seen = {}
    for at, lines in enumerate(trace(config, [], 0, 17)):
        for line in lines:
            seen.setdefault(line.id, set()).add(at)
    return next(id for id, steps in seen.items() if steps == {step})


def damaged(dataset, folder, harm, ids):
    """A copy of a dataset in which harm() was applied to the documents of these ids."""
    folder.mkdir()
    old = open_dataset(dataset)
    for index, info in enumerate(old.shards):
        shard = open_shard(old, index)
        documents = []
        for i in range(len(shard)):
            meta, concepts = shard.meta(i), shard.concepts(i).astype(np.float32)
            concepts = harm(concepts) if meta["id"] in ids else concepts
            documents.append(Document(shard.keys[i], meta["id"], meta["source"], meta["sentences"], concepts))
        commit(folder, write_shard(folder, info.name, documents))
        written = (folder / info.name).read_bytes()
        (folder / info.name).write_bytes(written.replace(MARK.tobytes(), np.full_like(MARK, np.nan).tobytes()))
    shutil.copy(dataset / "normalizer.safetensors", folder)
    finish_dataset(folder, old.info)
    return folder


def data(train, concepts):
    return {"train": str(train), "validation": str(concepts["validation"]), "row_length": 32, "max_segment": 16}


def test_a_nan_in_the_batch_of_one_rank_skips_the_step_on_all_and_names_the_documents(make_config, trained):
    config = make_config(steps=12, evaluate={"every": None})
    code, out, err = finish(start_faulty(config, "nan:1:6"))
    assert code == 0, out + err
    (incident,) = incidents(config)
    assert incident["step"] == 6
    assert "the loss is not finite, the step is skipped" in incident["what"]
    broken = [document for document in incident["documents"] if not document["finite"]]
    assert len(broken) == 1
    assert broken[0]["lane"] >= 4  # rank 1's
    assert {document["lane"] for document in incident["documents"]} == set(range(8))
    log = (run_dir(config) / "log.txt").read_text()
    assert f"documents with values that are not finite: {broken[0]['id']}" in log
    losses, complete = metrics(config, "loss"), metrics(trained(2), "loss")
    assert losses[7] is None
    assert metrics(config, "skipped_steps")[12] == 1
    assert len({losses[step] for step in range(8, 13)}) == 5
    assert max(losses[step] for step in range(8, 13)) < losses[1] < 1.1 * complete[1]


def test_stored_nans_are_named_and_too_many_in_a_row_are_rolled_back_and_skipped(make_config, concepts, tmp_path):
    settings = {"checkpoint": CHECKPOINT, "evaluate": {"every": None}, "epochs": 1, "steps": None}
    bad = {step: document_of(make_config(**settings), step) for step in (3, 11, 12, 13)}

    train = damaged(concepts["train"], tmp_path / "damaged", with_a_mark, bad.values())
    config = make_config(data={**data(train, concepts), "verify": "size"}, guard={"max_skipped": 3}, **settings)
    code, out, err = finish(start("launch", "--local", 2, config))
    assert code == 0, out + err
    found = incidents(config)
    assert [(incident["step"], incident["left_out"]) for incident in found] == [
        (3, None), (11, None), (12, None), (13, [11, 13]),
    ]  # fmt: skip
    for incident in found:
        broken = {document["id"] for document in incident["documents"] if not document["finite"]}
        assert broken == {bad[incident["step"]]}
    log = (run_dir(config) / "log.txt").read_text()
    assert "rolling back, skipping steps 11 to 13" in log
    assert f"step 10 of {STEPS}" in out  # after the rollback
    losses = metrics(config, "loss")
    assert [step for step in range(1, STEPS + 1) if step not in losses] == [12, 13, 14]
    assert [step for step in losses if losses[step] is None] == [4]
    newest = max((run_dir(config) / "checkpoints").glob("step_*"))
    assert json.loads((newest / "state.json").read_text())["left_out"] == [[11, 13]]
    assert json.loads((run_dir(config) / "left_out.json").read_text()) == [{"first": 11, "last": 13, "back_to": 10}]


@pytest.mark.slow
def test_a_run_that_stays_non_finite_rolls_back_once_and_then_ends_with_1(make_config):
    config = make_config(steps=20, optim={"lr": 1.0e30, "max_grad_norm": 0}, guard={"max_skipped": 3})
    code, _, err = finish(start("launch", "--local", 2, config))
    assert code == 1
    assert "not finite" in err
    assert "has already rolled back to step 0 and skipped the steps 1 to 3" in err
    assert "Traceback" not in err
    assert [incident["left_out"] for incident in incidents(config) if incident["left_out"]] == [[1, 3], [4, 6]]
    assert not list((run_dir(config) / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_spike_is_rolled_back_and_its_steps_are_skipped(make_config, concepts, tmp_path):
    settings = {"checkpoint": CHECKPOINT, "evaluate": {"every": None}, "epochs": 1, "steps": None}
    spike = document_of(make_config(**settings), 12)
    train = damaged(concepts["train"], tmp_path / "damaged", lambda values: values * 50, [spike])
    guard = {"spike_sigma": 8, "spike_window": 5, "on_spike": "rollback", "spike_steps": 2}
    config = make_config(data=data(train, concepts), guard=guard, **settings)
    code, out, err = finish(start("launch", "--local", 2, config))
    assert code == 0, out + err
    (incident,) = incidents(config)
    assert "loss spike: " in incident["what"]
    assert (incident["step"], incident["left_out"]) == (12, [11, 12])
    assert spike in {document["id"] for document in incident["documents"]}
    losses = metrics(config, "loss")
    assert [step for step in range(1, STEPS + 1) if step not in losses] == [12, 13]
    assert max(losses.values()) < 2


def test_a_run_that_hangs_logs_the_stacks_of_every_rank_and_ends_with_1(make_config):
    minutes = round(patience(3) / 60, 2)  # longer than a first step
    config = make_config(guard={"stall_minutes": minutes}, evaluate={"every": None})
    code, out, err = finish(start_faulty(config, "hang:1:4"))
    assert code == 1, out + err
    log = (run_dir(config) / "log.txt").read_text()
    for rank in ("", " rank 1"):
        assert f"ERROR{rank} lcm_ds.train: step 4: no progress for {minutes:g} minutes (guard.stall_minutes)" in log
    assert "in faulty" in log  # the thread of rank 1 that reads
    assert log.count("Thread 0x") > 4


# --- the monitor ------------------------------------------------------------------------------------------------------


def judged(guard, losses, first=0):
    steps = enumerate(losses, start=first)
    return [guard.check(step, loss, loss is None or math.isfinite(loss)) for step, loss in steps]


def test_a_loss_is_a_spike_if_it_is_sigma_above_a_full_window():
    guard = StepMonitor(GuardConfig(spike_sigma=3, spike_window=4), [])
    assert judged(guard, [1.0, 1.1, 9.0]) == [None] * 3  # the window is not full
    guard = StepMonitor(GuardConfig(spike_sigma=3, spike_window=4), [1.0, 1.1, 0.9, 1.0])
    assert judged(guard, [1.2, 0.1]) == [None, None]
    (spike,) = judged(guard, [5.0], first=6)
    assert (spike.step, spike.skip) == (6, None)
    assert spike.what == "loss spike: 5 (previous 4 steps: 0.8 ± 0.48)"


def test_a_resumed_monitor_decides_as_one_that_was_not_interrupted():
    config = GuardConfig(spike_sigma=2, spike_window=6)
    losses = [1 + 0.1 * math.sin(step) for step in range(20)] + [1.5]
    complete = judged(StepMonitor(config, []), losses)
    first = StepMonitor(config, [])
    judged(first, losses[:11])
    assert judged(StepMonitor(config, json.loads(json.dumps(first.state()))), losses[11:], first=11) == complete[11:]
    assert complete[-1] is not None


def test_a_step_without_targets_is_not_a_spike_and_not_in_the_window():
    guard = StepMonitor(GuardConfig(spike_sigma=3, spike_window=4), [1.0, 1.1, 0.9, 1.0])
    assert judged(guard, [None] * 9) == [None] * 9
    assert guard.state() == [1.0, 1.1, 0.9, 1.0]
    assert judged(guard, [5.0]) != [None]
    (incident,) = [guard.check(9, None, False)]
    assert incident.what == "the gradient is not finite, the step is skipped"


def test_skipped_steps_are_counted_in_a_row():
    guard = StepMonitor(GuardConfig(max_skipped=3), [])
    found = judged(guard, [math.nan, math.nan, 1.0, math.nan, math.nan, math.inf])
    assert [incident and incident.skip for incident in found] == [None] * 5 + [range(3, 6)]


def test_torchs_optimizer_skips_non_finite_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    skip_nonfinite_steps(optimizer)
    for gradient, overflow in ((1.0, False), (math.inf, True), (1.0, False)):
        before = parameter.detach().clone()
        parameter.grad = torch.tensor([1.0, gradient, 1.0])
        optimizer.step()
        assert optimizer.overflow is overflow
        assert torch.equal(parameter, before) is overflow
    assert optimizer.state[parameter]["step"] == 2
