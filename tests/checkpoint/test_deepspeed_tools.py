"""DeepSpeed's own tools read a run's checkpoints as their help says."""

import subprocess
import sys

import pytest
import torch
from runs import ROOT, finish, start, write_tiny_config

from lcm_ds.checkpoint.format import Checkpoint, load_model, write_latest


def trained(dataset, folder, json):
    config = write_tiny_config(
        dataset, folder, checkpoint={"every": 1, "keep": 2}, deepspeed=f"{ROOT}/ds_configs/{json}"
    )
    code, out, err = finish(start("launch", "--local", 1, config))
    assert code == 0, out + err
    return folder / "run"


@pytest.mark.parametrize("json", [pytest.param("zero2_fp32.json", marks=pytest.mark.slow), "zero2_bf16.json"])
def test_zero_to_fp32_takes_the_newest_checkpoint(synthetic_dataset, tmp_path, json):
    run = trained(synthetic_dataset(), tmp_path, json)
    checkpoints = run / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step_00000002"
    command = [sys.executable, "zero_to_fp32.py", ".", tmp_path / "out"]
    done = subprocess.run(command, cwd=checkpoints, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    own = load_model(run)[0].state_dict()
    assert all(torch.equal(weights[name], own[name]) for name in weights)
    assert {name for name, _ in load_model(run)[0].named_parameters()} <= weights.keys()

    # A checkpoint that is corrupt is not named.
    Checkpoint(checkpoints / "step_00000002", 2).quarantine()
    write_latest(run)
    assert (checkpoints / "latest").read_text() == "step_00000001"
    Checkpoint(checkpoints / "step_00000001", 1).delete()
    write_latest(run)
    assert not (checkpoints / "latest").exists()


def test_a_script_that_could_not_read_the_files_is_not_there(synthetic_dataset, tmp_path):
    run = trained(synthetic_dataset(), tmp_path, "zero1_bf16.json")
    assert (run / "checkpoints/latest").read_text() == "step_00000002"
    assert not list(run.rglob("zero_to_fp32.py"))
