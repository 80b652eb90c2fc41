"""Runs with products in fp8 learn, resume, evaluate and export as in bf16; impossible ones are refused."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from runs import finish, metrics, run_dir, start

from lcm_ds import BaseLCM
from lcm_ds.config import TrainConfig, load
from lcm_ds.convert.export import export

BF16 = "ds_configs/zero1_bf16.json"
SAVES = {"checkpoint": {"every": 20, "keep": 2}}
EMULATED = {"deepspeed": BF16, "train": {"precision": "fp8-emulated"}, **SAVES}


@pytest.fixture
def half_way(trained, make_config):
    """A copy of an emulated run on two ranks, without its last checkpoint; it resumes from step 20 of 40."""
    config = make_config(**EMULATED)
    copy = run_dir(config)
    shutil.copytree(run_dir(trained(2, **EMULATED)), copy)
    shutil.rmtree(copy / "checkpoints/step_00000040")
    return config


@pytest.mark.slow
def test_a_run_learns_as_in_bf16(trained):
    fp8, bf16 = (metrics(trained(2, **changes), "val_loss") for changes in (EMULATED, {"deepspeed": BF16, **SAVES}))
    assert fp8 != bf16
    assert fp8 == pytest.approx(bf16, rel=0.01)
    assert fp8[40] < 0.95 * fp8[20]
    header = (run_dir(trained(2, **EMULATED)) / "log.txt").read_text()
    assert "2 rank(s), ZeRO 1, bfloat16, products in fp8-emulated" in header


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(trained, half_way):
    code, out, err = finish(start("launch", "--local", 2, half_way))
    assert code == 0, out + err
    assert "step 20 of 40" in out
    assert "changed since" not in out
    for key in ("loss", "grad_norm", "val_loss"):
        assert metrics(half_way, key) == metrics(trained(2, **EMULATED), key)


@pytest.mark.slow
def test_a_run_resumes_in_bf16_on_other_ranks(trained, half_way):
    code, out, err = finish(start("launch", "--local", 1, half_way, "train.precision=null"))
    assert code == 0, out + err
    assert "changed since step 20:\n  train.precision" in out + (run_dir(half_way) / "log.txt").read_text()
    assert metrics(half_way, "val_loss") == pytest.approx(metrics(trained(2, **EMULATED), "val_loss"), rel=0.01)


@pytest.mark.slow
def test_exports_and_evaluations_are_those_of_a_model_in_bf16(trained, tmp_path):
    config = trained(2, **EMULATED)
    export(run_dir(config), tmp_path / "model")
    model = BaseLCM.from_pretrained(tmp_path / "model")
    assert all(type(module) is torch.nn.Linear for module in model.modules() if isinstance(module, torch.nn.Linear))
    other = BaseLCM.from_pretrained(exported(trained(2, deepspeed=BF16, **SAVES), tmp_path / "bf16"))
    assert list(model.state_dict()) == list(other.state_dict())
    code, out, err = finish(start("evaluate", run_dir(config), "--json", tmp_path / "figures.json"))
    assert code == 0, out + err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["scores"]["Base-LCM"]["normalised"]["mse"] == pytest.approx(metrics(config, "val_loss")[40], rel=0.1)


def exported(config, folder):
    export(run_dir(config), folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_run_follows_an_uncompiled_one(make_config):
    losses = []
    for compiled in (False, True):
        config = make_config(**{**EMULATED, "train": {"precision": "fp8-emulated", "compile": compiled}}, steps=4)
        code, out, err = finish(start("launch", "--local", 1, config), timeout=400)
        assert code == 0, out + err
        losses.append(metrics(config, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(call, *arguments):
    code, out, err = call(*arguments)
    assert code == 2, out + err
    return err.splitlines()


@pytest.mark.parametrize(
    "command", [["train"], ["launch", "--local", 2], ["doctor"]], ids=["train", "launch", "doctor"]
)
def test_a_device_without_fp8_is_refused_and_emulation_is_not(call, make_config, command):
    config = make_config(deepspeed=BF16, train={"precision": "fp8", "compile": True})
    (line,) = refused(call, *command, config)
    assert line.startswith("train.precision: fp8 needs NVIDIA GPUs of compute capability 8.9 or higher")
    assert "not cpu" in line
    assert call("train", config, "--dry-run")[0] == 0
    assert not run_dir(config).exists()
    if command == ["doctor"]:
        assert call(*command, config, "train.precision=fp8-emulated")[0] == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"deepspeed": "ds_configs/zero1_fp32.json"},
            "needs bf16 in the DeepSpeed JSON, not float32",
        ),
        (
            {"deepspeed": "ds_configs/zero3_bf16.json"},
            "needs ZeRO 0 to 2: ZeRO-3 could not free gathered weights",
        ),
        (
            {"train": {"precision": "fp8"}},
            "needs train.compile: true: uncompiled, conversions cost more than fp8 saves",
        ),
        ({"model": {"hidden_size": 40}}, "needs multiples of 16, but model.hidden_size is 40"),
        ({"model": {"intermediate_size": 72}}, "needs multiples of 16, but model.intermediate_size is 72"),
        ({"data": {"row_length": 30}}, "needs multiples of 16, but batch.micro_batch_rows · data.row_length is 120"),
    ],
)
def test_what_fp8_needs_is_refused_in_a_line_without_it(call, make_config, changes, reason):
    config = make_config(**EMULATED)
    mapping = yaml.safe_load(config.read_text())
    for key, value in changes.items():
        mapping[key] = {**mapping[key], **value} if isinstance(value, dict) else value
    config.write_text(yaml.safe_dump(mapping))
    precision = mapping["train"]["precision"]
    assert refused(call, "train", config, "--dry-run") == [f"{config}: train.precision: {precision} {reason}"]


def test_a_missing_torchao_and_other_precisions_are_refused(call, make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    config = make_config(**EMULATED)
    assert refused(call, "train", config, "--dry-run") == [
        f"{config}: train.precision: fp8-emulated needs the package torchao: pip install 'lcm-ds[fp8]'"
    ]
    (line,) = refused(call, "train", config, "--dry-run", "train.precision=fp4")
    assert line == f"{config}: train.precision: input should be 'fp8' or 'fp8-emulated', not 'fp4'"
    assert call("train", config, "--dry-run", "train.precision=null")[0] == 0


# --- the shipped config -----------------------------------------------------------------------------------------------


def test_1_6b_fp8_is_1_6b_but_for_its_products():
    bf16, fp8 = (load(TrainConfig, f"configs/train/{name}.yaml").model_dump() for name in ("1.6b", "1.6b_fp8"))
    assert fp8.pop("train") == {**bf16.pop("train"), "precision": "fp8"}
    assert fp8.pop("run_dir") != bf16.pop("run_dir")
    assert fp8 == bf16
