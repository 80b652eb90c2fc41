"""The documents of a step are known without training up to it."""

import json

import pytest
from runs import metrics, run_dir

from lcm_ds.train.job_builder import build_job
from lcm_ds.train.trace import trace


def test_trace_names_each_segment_of_a_step(call, make_config):
    config = make_config()
    code, out, err = call("trace", config, "--step", 25)
    assert code == 0, err
    (lines,) = trace(config, [], 25)
    head, *printed = out.splitlines()
    assert head == "step 25  loss not logged"
    assert {line.lane for line in lines} == set(range(8))
    for lane in range(8):
        assert sum(line.stop - line.start for line in lines if line.lane == lane) == 32
    for line, text in zip(lines, printed, strict=True):
        assert line.id in text
        assert f"{line.shard} {line.key}" in text
        assert text.endswith("  " + " ".join(" ".join(line.sentences).split()[:8]))


@pytest.mark.slow
def test_a_range_has_the_loss_of_every_step_beside_its_documents(call, trained):
    config = trained(2, log={"every": 7})
    folder = run_dir(config)
    code, out, err = call("trace", folder, "--range", 11, 14, "--text")
    assert code == 0, err
    # The losses of every step, although metrics.jsonl has a line only for every seventh.
    each = metrics(trained(2), "loss")
    steps = trace(folder, [], 11, 14)
    heads = [line for line in out.splitlines() if line.startswith("step ")]
    assert heads == [f"step {step}  loss {each[step + 1]:.6g}" for step in range(11, 15)]
    sentences = [text for lines in steps for line in lines for text in line.sentences]
    printed = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("    ")]
    assert printed == sentences
    assert sum(line.startswith("row ") for line in out.splitlines()) == sum(map(len, steps))


def test_a_run_folder_and_its_config_trace_alike(trained):
    config = trained(2)
    assert trace(config, [], 3) == trace(run_dir(config), [], 3)


def test_a_run_that_was_trained_in_another_order_is_not_traced(call, make_config):
    config = make_config()
    checkpoint = run_dir(config) / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    (run_dir(config) / "config.yaml").write_bytes(config.read_bytes())
    (checkpoint / "COMPLETE").write_text(json.dumps({"files": {}}))
    for mark, code in ((build_job(config, (), 1).fingerprint, 0), ("of an earlier version", 2)):
        (checkpoint / "state.json").write_text(json.dumps({"fingerprint": mark}))
        found, _, err = call("trace", run_dir(config), "--step", 3)
        assert found == code, err
    assert err.startswith(f"{run_dir(config)}: its checkpoint of step 20 was trained with another data order")
