"""Runs resume from valid checkpoints, on any number of ranks and under another ZeRO stage."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from machine import patience
from runs import ROOT, finish, metrics, run_dir, start

from lcm_ds.checkpoint import load as resume
from lcm_ds.checkpoint.format import Checkpoint
from lcm_ds.errors import InputError
from lcm_ds.model.kernels import PRODUCTS
from lcm_ds.train.reliability.run_lock import RunLock

STEPS = [2, 4, 6, 8, 10, 12]
OF_A_RANK = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
ROUND = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
MUON = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Muon"}, "bf16": {"enabled": True}}
CONSTANT = {"lr": 2.0e-3, "schedule": {"name": "constant"}}


def folders(config):
    return sorted(path.name for path in (run_dir(config) / "checkpoints").glob("step_*"))


def launch(config, *overrides, ranks=2):
    return finish(start("launch", "--local", ranks, config, *overrides))


def launched(config, *overrides, ranks=2):
    code, out, err = launch(config, *overrides, ranks=ranks)
    assert code == 0, out + err
    return out + err


# --- which checkpoint -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(make_config):
    """A finished run of 12 steps with a checkpoint every 2 of them."""
    config = make_config(steps=12, optim=CONSTANT, checkpoint={"every": 2, "keep": 6}, evaluate={"every": None})
    launched(config)
    assert folders(config) == [f"step_{step:08d}" for step in STEPS]
    return config


def damaged_copy(saved, tmp_path, integrity_error):
    """A copy of the run with {step: (what is done to a file, its name)} done to its checkpoints."""
    mapping = yaml.safe_load(saved.read_text())
    mapping["run_dir"] = shutil.copytree(mapping["run_dir"], tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**mapping, "run_dir": str(mapping["run_dir"])}))
    for step, (harm, name) in integrity_error.items():
        harm(tmp_path / f"run/checkpoints/step_{step:08d}" / name)
    return config


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


def test_the_newest_valid_checkpoint_is_used_and_the_others_are_named_and_moved_aside(saved, tmp_path):
    integrity_error = {12: (flip_a_byte, OF_A_RANK), 10: (remove, OF_A_RANK), 8: (cut_short, OF_A_RANK)}
    integrity_error |= {6: (flip_a_byte, "state.json"), 4: (lambda path: path.write_text('{"files": []}'), "COMPLETE")}
    config = damaged_copy(saved, tmp_path, integrity_error)
    (tmp_path / "run/checkpoints/step_00000015.partial").mkdir()
    output = launched(config)
    assert f"step_00000012 is incomplete or corrupt ({OF_A_RANK} is not what was written" in output
    assert f"step_00000010 is incomplete or corrupt ({OF_A_RANK} is missing" in output
    assert f"step_00000008 is incomplete or corrupt ({OF_A_RANK} has " in output
    assert "step_00000006 is incomplete or corrupt (state.json is not what was written" in output
    assert "step_00000004 is incomplete or corrupt (COMPLETE cannot be read" in output
    assert f"resuming from {run_dir(config)}/checkpoints/step_00000002" in output
    assert folders(config) == sorted(
        [f"step_{step:08d}" for step in STEPS] + [f"step_{step:08d}.bad" for step in STEPS[1:]]
    )
    assert metrics(config, "loss") == metrics(saved, "loss")


def test_without_a_valid_checkpoint_the_run_ends_with_1_and_nothing_is_overwritten(saved, tmp_path):
    config = damaged_copy(
        saved, tmp_path, dict.fromkeys(STEPS[:-1], (remove, OF_A_RANK)) | {12: (flip_a_byte, OF_A_RANK)}
    )
    before = {
        path: path.read_bytes()
        for path in run_dir(config).rglob("*")
        if path.is_file() and path.name not in ("log.txt", "LOCK")
    }
    code, _, err = finish(start("train", config))
    assert code == 1
    assert "no checkpoint is valid" in err
    assert all(f"step_{step:08d}" in err for step in STEPS)
    assert "Traceback" not in err
    assert all(path.read_bytes() == data for path, data in before.items())
    assert {path for path in run_dir(config).rglob("*") if path.is_file()} == {
        *before,
        run_dir(config) / "log.txt",
        run_dir(config) / "LOCK",
    }


@pytest.mark.slow
def test_verify_size_compares_only_sizes(saved, tmp_path):
    config = damaged_copy(saved, tmp_path, {12: (cut_short, OF_A_RANK)})
    (run_dir(config) / "metrics.jsonl").unlink()
    output = launched(config, "checkpoint.verify=size")
    assert "step_00000012 is incomplete or corrupt" in output
    assert list(metrics(config, "loss")) == [11, 12]


# --- elastic ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_resumes_with_other_ranks_zero_stages_and_micro_batches(make_config):
    undisturbed = make_config(steps=24, optim=CONSTANT, deepspeed="ds_configs/zero1_fp32.json")
    launched(undisturbed, ranks=1)
    config = make_config(steps=24, optim=CONSTANT)
    for ranks, stage, rows, steps in ((4, 3, 2, 8), (2, 2, 4, 16), (1, 1, 8, 24)):
        deepspeed = f"deepspeed=ds_configs/zero{stage}_fp32.json"
        output = launched(config, deepspeed, f"batch.micro_batch_rows={rows}", f"steps={steps}", ranks=ranks)
        assert ("converting" in output) == (steps > 8)
    assert metrics(config, "loss") == pytest.approx(metrics(undisturbed, "loss"), rel=1e-4)
    assert metrics(config, "concepts") == metrics(undisturbed, "concepts")
    assert folders(config) == [
        "step_00000008", "step_00000008.universal", "step_00000016", "step_00000016.universal", "step_00000024",
    ]  # fmt: skip
    # Converted once, and again if the conversion is corrupt.
    checkpoints = run_dir(config) / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000024")
    flip_a_byte(checkpoints / "step_00000016.universal/zero/norm.weight/exp_avg.pt")
    output = launched(config, "deepspeed=ds_configs/zero1_fp32.json", "batch.micro_batch_rows=8", ranks=1)
    assert "step_00000016.universal is incomplete or corrupt (zero/norm.weight/exp_avg.pt is not what" in output
    assert metrics(config, "loss") == pytest.approx(metrics(undisturbed, "loss"), rel=1e-4)


def test_a_run_keeps_its_kernels_when_it_resumes_unless_its_config_fixes_others(make_config):
    config = make_config(steps=2, optim=CONSTANT, evaluate={"every": None})

    def trained_to(steps, *overrides):
        out = launched(config, f"steps={steps}", *overrides, ranks=1)
        state = run_dir(config) / "checkpoints" / f"step_{steps:08d}" / "state.json"
        return json.loads(state.read_text())["kernels"], out

    others = "train.kernels.attention=products", "train.kernels.products=torch"
    first = {"attention": "products", **dict.fromkeys(PRODUCTS, "torch")}
    reasons = [f"{piece} by {way}" for piece, way in first.items()]
    found, out = trained_to(2, *others)
    assert found == first
    assert "kernels: " + "; ".join(f"{reason}, as configured" for reason in reasons) in out
    found, out = trained_to(3)
    assert found == first
    assert "kernels: " + "; ".join(reasons) in out
    found, out = trained_to(4, "train.kernels.attention=sdpa")
    assert found == {**first, "attention": "sdpa"}
    assert "kernels: " + "; ".join(reasons[1:]) in out


def test_another_precision_model_or_optimizer_is_refused_with_both_named(saved):
    before = folders(saved)
    changes = ["deepspeed=ds_configs/zero2_bf16.json", "model.num_hidden_layers=3", "seed=8"]
    code, _, err = launch(saved, "steps=20", *changes)
    assert code == 2
    lines = [line for line in err.splitlines() if "step_00000012" in line]
    undo = "undo that or use a new run_dir"
    assert sorted(line.partition(": ")[2] for line in lines) == [  # printed once, by one rank
        f"model.num_hidden_layers was 2 and is now 3; {undo}",
        f"seed was 7 and is now 8; {undo}",
        f"the precision was float32 and is now bfloat16; {undo}",
    ]
    assert folders(saved) == before


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"world_size": 4}, None),
        ({"zero_stage": 3}, None),
        ({"zero_stage": 0}, "the unpartitioned optimizer of ZeRO 0"),
        ({"world_size": 4, "optimizer": "Muon"}, "converts only Adam's states"),
        ({"world_size": 4, "nvme": True}, "offloaded to NVMe"),
        ({"optimizer": "Muon"}, None),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(tmp_path, now, expected):
    then = {"fingerprint": "a", "model": {}, "precision": "float32", "world_size": 2, "zero_stage": 2, "nvme": False}
    then["optimizer"] = now.get("optimizer", "AdamW")
    (tmp_path / "state.json").write_text(json.dumps(then))
    lines = resume.errors(Checkpoint(tmp_path, 5), {**then, **now})
    if expected is None:
        assert lines == []
    else:
        (line,) = lines
        assert "was saved by 2 rank(s) under ZeRO 2 and would resume with" in line
        assert expected in line


def test_a_refusal_names_the_changed_keys_that_the_order_depends_on_or_the_shards(tmp_path):
    data = {"train": [{"path": "a", "weight": 1.0}], "row_length": 32, "shuffle_shards": None}
    config = {"seed": 1, "batch": {"rows_per_step": 8}, "data": data, "noise_std": 0.1}
    then = {"fingerprint": "a", "model": {}, "optimizer": "AdamW", "zero_stage": 1, "world_size": 1, "config": config}
    (tmp_path / "state.json").write_text(json.dumps(then))
    changed = {**config, "seed": 2, "noise_std": 0.2, "data": {**data, "row_length": 64}}
    undo = "undo that or use a new run_dir"
    assert resume.errors(Checkpoint(tmp_path, 5), {**then, "fingerprint": "b", "config": changed}) == [
        f"{tmp_path}: seed was 1 and is now 2; {undo}",
        f"{tmp_path}: data.row_length was 32 and is now 64; {undo}",
    ]
    assert resume.errors(Checkpoint(tmp_path, 5), {**then, "fingerprint": "b"}) == [
        f"{tmp_path}: the shards of data.train are not those that it was trained on; restore them, or use a new run_dir"
    ]


def test_a_run_of_the_former_data_order_is_refused_with_what_to_do(tmp_path):
    then = {"fingerprint": "a", "model": {}, "precision": "float32", "versions": {"lcm_ds": "0.0.9"}}
    (tmp_path / "state.json").write_text(json.dumps(then))
    assert resume.errors(Checkpoint(tmp_path, 5), {**then, "fingerprint": "b", "order": 2}) == [
        f"{tmp_path}: was trained in data order 1, and this version of lcm-ds has only order 2: continue with the "
        "version that began it (0.0.9), or start a new run with model.init_from"
    ]


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ({"zero_optimization": {"stage": 3}}, {"zero_optimization": {"stage": 3, "sub_group_size": 10}}, None),
        (ROUND, {"zero_optimization": {"stage": 2}}, "mixes up parameters under round_robin_gradients"),
        (ROUND, ROUND, None),
        (MUON, {**MUON, "data_types": {"grad_accum_dtype": "fp32"}}, "converts only Adam's states"),
    ],
)
def test_another_layout_of_the_files_is_converted_or_refused(tmp_path, then, now, expected):
    state = {"fingerprint": "a", "model": {}, "precision": "bfloat16", "world_size": 2, "nvme": False}
    states = [
        {
            **state,
            "deepspeed": ds,
            "zero_stage": ds["zero_optimization"]["stage"],
            "optimizer": ds.get("optimizer", {"type": "AdamW"})["type"],
        }
        for ds in (then, now)
    ]
    (tmp_path / "state.json").write_text(json.dumps(states[0]))
    assert resume.needs_conversion(*states) == (then != now)
    lines = resume.errors(Checkpoint(tmp_path, 5), states[1])
    assert lines == [] if expected is None else expected in lines[0]
    older = {key: value for key, value in states[0].items() if key != "deepspeed"}
    assert not resume.needs_conversion(older, states[1])


def test_config_changes_since_the_checkpoint_are_a_table(tmp_path):
    zero = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2}
    now = {
        "config": {
            "run_dir": "moved",
            "optim": {"betas": [0.9, 0.95], "weight_decay": 0.0},
            "new": 1,
            "deepspeed": "b",
        },
        "deepspeed": {**zero, "gradient_accumulation_steps": 4, "wall_clock_breakdown": True},
        "world_size": 1,
    }
    then = {
        "config": {
            "run_dir": "runs/a",
            "optim": {"betas": [0.9, 0.98], "weight_decay": 0.1},
            "gone": 2,
            "deepspeed": "a",
        },
        "deepspeed": zero,
        "world_size": 2,
    }
    table = (
        "changed since step 5:\n"
        "  optim.betas                     [0.9, 0.98] → [0.9, 0.95]\n"
        "  optim.weight_decay              0.1 → 0.0\n"
        "  deepspeed.wall_clock_breakdown  null → true\n"
        "  ranks                           2 → 1"
    )
    checkpoint = Checkpoint(tmp_path / "step", 5)
    checkpoint.path.mkdir()
    state = checkpoint.path / "state.json"
    state.write_text(json.dumps(then))
    assert resume.changes(checkpoint, tmp_path, now) == table
    state.write_text(json.dumps(now))
    assert resume.changes(checkpoint, tmp_path, now) is None
    # A checkpoint of an older version has no config: the run's files replace it, if there are any.
    state.write_text(json.dumps({"world_size": 2}))
    assert resume.changes(checkpoint, tmp_path, now) is None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(then["config"]))
    (tmp_path / "ds_config.json").write_text(json.dumps(zero))
    assert resume.changes(checkpoint, tmp_path, now) == table


def test_a_dynamic_loss_scale_is_kept_within_the_limits_of_the_config():
    settings = {"delayed_shift": 2, "consecutive_hysteresis": False}
    loaded = DynamicLossScaler(2.0**16, scale_window=1000, min_scale=1, **settings)
    loaded.cur_scale, loaded.cur_iter, loaded.last_overflow_iter, loaded.cur_hysteresis = 64.0, 70, 66, 1
    own = DynamicLossScaler(2.0**20, scale_window=50, min_scale=1, **settings)
    found = resume.scaler_as_configured(own, loaded)
    assert (found.cur_scale, found.cur_iter, found.last_overflow_iter, found.cur_hysteresis) == (64.0, 70, 66, 1)
    assert found.scale_window == 50
    own = DynamicLossScaler(2.0**20, scale_window=50, min_scale=128.0, **settings)
    assert resume.scaler_as_configured(own, loaded).cur_scale == 128.0
    assert resume.scaler_as_configured(LossScaler(256.0), loaded).cur_scale == 256.0
    assert resume.scaler_as_configured(LossScaler(256.0), LossScaler(8.0)).cur_scale == 256.0


# --- retention, disks, locks --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_after_100_steps_the_rules_decide_which_checkpoints_are_left(make_config):
    config = make_config(
        steps=100,
        checkpoint={"every": 5, "keep": 3, "keep_every": 30},
        evaluate={"every": None},
        log={"every": 50},
    )
    launched(config)
    assert folders(config) == [f"step_{step:08d}" for step in (30, 60, 90, 95, 100)]
    stalls = metrics(config, "checkpoint_time")
    assert len(stalls) >= 19  # two may be committed at one step: the pending one and the last
    assert all(seconds > 0 for seconds in stalls.values())
    assert 0 < list(metrics(config, "checkpoint_share").values())[-1] < 1


DISK = """
mount -t tmpfs -o size={size}k tmpfs {folder} || exit 99
head -c {filler}k /dev/zero > {folder}/filler
{python} -m lcm_ds.cli launch --local 2 {config} &
until [ -n "$(grep -s 'was not written' {folder}/run/log.txt {stderr})" ]; do sleep 0.05; kill -0 $! || exit 98; done
rm {folder}/filler
wait $!
code=$?
cp -r {folder}/run {kept}
exit $code
"""


@pytest.mark.slow
def test_a_run_continues_on_a_full_disk_and_saves_when_there_is_room_again(make_config, trained, tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces")
    disk, kept, stderr = tmp_path / "disk", tmp_path / "kept", tmp_path / "stderr"
    disk.mkdir()
    config = make_config(
        run_dir=str(disk / "run"), checkpoint={"every": 3, "keep": 2}, evaluate={"every": 20, "rows": 16}
    )
    size = 3000  # KiB: room for the metrics and for two checkpoints, and then for none
    script = DISK.format(
        size=size, filler=size - 1100, folder=disk, python=sys.executable, config=config, kept=kept, stderr=stderr
    )
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with stderr.open("w") as file:
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, env=env, stderr=file, check=False)
    output = stderr.read_text()
    assert done.returncode == 0, output
    assert "was not written: rank " in output
    assert "No space left on device" in output
    mapping = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**mapping, "run_dir": str(kept)}))
    assert folders(config) == ["step_00000039", "step_00000040"]
    assert list(metrics(config, "loss")) == list(range(1, 41))
    assert metrics(config, "loss") == metrics(trained(2), "loss")


@pytest.mark.slow
def test_a_run_folder_is_locked_until_its_process_ends(make_config):
    every = {"every": None, "every_minutes": 0.01}
    config = make_config(steps=100_000, checkpoint=every, evaluate={"every": None})
    first = start("launch", "--local", 2, config)
    while not list((run_dir(config) / "checkpoints").glob("step_*/COMPLETE")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    owner = json.loads((run_dir(config) / "LOCK").read_text())
    code, _, err = finish(start("train", config))
    assert code == 2
    assert f"run directory is locked by PID {owner['pid']} on {owner['host']}" in err
    assert first.poll() is None
    workers = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    # Its workers die with the launcher; the lock need not be removed.
    _, alive = psutil.wait_procs(workers, timeout=patience(60))
    assert not alive
    third = start("train", config, "steps=1", "optim.schedule.warmup_steps=0")
    code, out, err = finish(third)
    assert code == 0, out + err


def test_a_lock_of_a_dead_machine_is_taken_over(tmp_path):
    """As of a machine that is cut off: its lock exists, and the file is not updated any more."""
    (tmp_path / "LOCK").write_text(json.dumps({"host": "far", "pid": 7, "machine": "other", "beat": 3}))
    with (tmp_path / "LOCK").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with RunLock(tmp_path, beat=0.1, watch=1.0):
            assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
            with pytest.raises(InputError, match=f"PID {os.getpid()} on"):
                RunLock(tmp_path).__enter__()


def test_a_lock_of_another_machine_is_respected_while_it_is_updated(tmp_path):
    (tmp_path / "LOCK").write_text(json.dumps({"host": "far", "pid": 7, "machine": "other", "beat": 0}))
    started = time.monotonic()
    with RunLock(tmp_path, beat=0.1, watch=1.0):
        assert time.monotonic() - started > 1.0
        owner = json.loads((tmp_path / "LOCK").read_text())
        assert owner["pid"] == os.getpid()
    writer = f"""
import itertools, json, time
for beat in itertools.count():
    text = json.dumps({{"host": "far", "pid": 7, "machine": "other", "beat": beat}})
    open({str(tmp_path / "LOCK")!r}, "w").write(text)
    time.sleep(0.2)
"""
    far = subprocess.Popen([sys.executable, "-c", writer])
    try:
        while not (tmp_path / "LOCK").read_text():
            time.sleep(0.01)
        with pytest.raises(InputError, match="PID 7 on far"):
            RunLock(tmp_path, beat=0.1, watch=5.0).__enter__()
    finally:
        far.send_signal(signal.SIGKILL)
        far.wait()
