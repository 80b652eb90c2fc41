"""Plans: what a run takes, from the configs alone, before its data is there."""

import json
import subprocess
import sys

import pytest
from machine import patience
from runs import ROOT, finish, metrics, run_dir, start

from lcm_ds.checkpoint.format import Checkpoint, folder_name, list_checkpoints, retain
from lcm_ds.config import CheckpointConfig, PrepareConfig, TrainConfig, load
from lcm_ds.devices import GPUS, gpu_named
from lcm_ds.errors import InputError
from lcm_ds.launcher.task import preparation_task
from lcm_ds.model.sizes import PRESETS, ModelSizes, count_parameters
from lcm_ds.train.budget import checkpoints_on_disk, gpu_hours
from lcm_ds.train.job_builder import outline
from lcm_ds.train.memory import USABLE, checkpoint_bytes, device_peak, largest_micro_batch

PAPER = ("configs/train/1.6b.yaml", "data.train=not/there", "data.validation=not/there")


@pytest.fixture
def plan(call):
    """plan(*arguments) -> the lines of a dry run by their names; warnings under "warning:"."""

    def plan(*arguments):
        code, out, err = call("train", *arguments, "--dry-run")
        assert code == 0, err
        return dict(line.split(maxsplit=1) for line in out.splitlines())

    return plan


def test_a_plan_needs_no_data_no_torch_and_little_time():
    """On a bare clone; the libraries of training take most of ten seconds to import."""
    command = ["train", *PAPER, "--dry-run", "--ranks", "8", "--gpu", "h100"]
    code = (
        "import sys; from lcm_ds.cli import main; assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'spacy', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, timeout=patience(3)
    )
    assert done.returncode == 0, done.stderr
    assert "\ndata          not there yet: not/there\n" in done.stdout


def test_a_mistake_in_the_yaml_is_told_before_torch_is_imported():
    code = (
        "import sys; from lcm_ds.cli import main; assert main(sys.argv[1:]) == 2\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    for command in (["train"], ["launch", "--local", "2"], ["doctor"], ["prepare"]):
        config = f"configs/{'prepare' if command == ['prepare'] else 'train'}/quickstart.yaml"
        done = subprocess.run(
            [sys.executable, "-c", code, *command, config, "sed=1"],
            cwd=ROOT, capture_output=True, text=True, timeout=patience(60),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[0].startswith(f"{config}: sed: unknown key")


def test_hours_are_those_of_six_flops_per_weight_and_concept(plan):
    """And of attention, a few per cent: 250,000 steps of 229,376 concepts, 8 H100 of 989 TFLOP/s in dense bf16."""
    lines = plan(*PAPER, "--ranks", 8, "--gpu", "h100", "--price-per-gpu-hour", 2)
    assert lines["run"].startswith("250,000 steps, 57,344,000,000 concepts; warm-up 10,000 steps, 4.0% of the run: ")
    hours, gpu_hours, cost = (
        [float(each.replace(",", "")) for each in lines[name].replace(":", " ").split(" / ", 2)[:2]]
        for name in ("hours", "GPU-hours", "cost")
    )
    expected = 6 * 1_649_185_792 * 57_344_000_000 / (989e12 * 0.2) / 3600
    assert gpu_hours[0] == pytest.approx(expected, rel=0.03)
    assert gpu_hours[1] == pytest.approx(gpu_hours[0] / 2, rel=0.01)  # 40 % MFU
    assert hours[0] == pytest.approx(gpu_hours[0] / 8, rel=0.01)
    assert cost == pytest.approx([2 * each for each in gpu_hours], rel=0.01)
    assert "989 TFLOP/s (dense bf16, datasheet)" in lines["GPU-hours"]
    stated = plan(*PAPER, "--ranks", 8, "--gpu", "h100", "log.peak_tflops=1978")
    assert float(stated["GPU-hours"].split()[0]) == pytest.approx(gpu_hours[0] / 2, rel=0.01)
    assert "1978 TFLOP/s (log.peak_tflops)" in stated["GPU-hours"]
    assert plan(*PAPER)["hours"].startswith("not known: --gpu h100")


def test_at_the_utilisation_of_a_run_a_plan_has_the_runs_own_speed(trained):
    """A plan counts segments of the maximum length, a few per cent more than there are."""
    config = trained(2, steps=8, log={"every": 1, "peak_tflops": 0.01})
    run = outline(config, [], 2, concepts=10_000)
    mfu, step_time = metrics(config, "mfu"), metrics(config, "step_time")
    for step in range(1, 8):
        planned = gpu_hours(run, 0.01, mfu[step]) * 3600 / 2 / run.total_steps
        assert 1 < planned / step_time[step] < 1.15


def test_the_concepts_of_an_epoch_can_be_given_instead_of_the_data(plan, make_config, concepts):
    lines = plan("configs/train/400m.yaml", "--concepts", "500M", "--embed-dim", 1024, "--ranks", 8)
    assert lines["run"].startswith("3,815 steps, 500,000,000 concepts, 1.00 epochs; warm-up 150 steps, 3.9% of the run")
    assert "500,000,000 concepts of 1024 (--concepts): 3,814.7 steps per epoch" in lines["data"]
    assert "1.02 TB as float16, 512 GB as int8" in lines["data"]
    assert "warning:" not in lines
    lines = plan("configs/train/400m.yaml", "--concepts", "500M", "epochs=5")
    assert lines["warning:"].startswith("5.0 epochs: beyond 4, reading the same data again helps less and less")
    # also of a run whose data is there
    config = make_config(epochs=3, steps=None)
    total = json.loads((concepts["train"] / "dataset.json").read_text())["totals"]["concepts"]
    given, own = plan(config, "--concepts", total), plan(config)
    assert given["run"].partition(";")[0] == own["run"].partition(";")[0]


def test_the_length_of_epochs_of_unknown_data_is_unknown_and_everything_else_is_printed(plan):
    lines = plan("configs/train/400m.yaml", "data.train=not/there", "--gpu", "h100")
    assert lines["run"].startswith("1 epoch(s) of data whose size is not known")
    assert lines["hours"].startswith("not known: --concepts N")
    assert lines["checkpoint"] == "5.6 GB: 14 bytes per parameter, weights and AdamW's states under ZeRO 1"
    assert "disk" not in lines
    assert "GiB per rank" in lines["host"]


def refused(call, *arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    return err.splitlines()


def test_mistakes_in_a_plan_are_refused_as_those_of_a_run(call):
    of_400m = ("train", "configs/train/400m.yaml", "--dry-run")
    given = ("--concepts", "10M")
    assert refused(call, *of_400m, *given) == [
        "configs/train/400m.yaml: optim.schedule.warmup_steps: 150: the run has 77 steps and would never reach "
        "optim.lr; the LCM paper's 4 % would be 3"
    ]
    assert refused(call, *of_400m, "--concepts", "1G", "--embed-dim", 384) == [
        "configs/train/400m.yaml: model.embed_dim: is 1024, but --embed-dim is 384; set model.embed_dim=384"
    ]
    assert refused(call, *of_400m, "--embed-dim", 384) == ["--embed-dim 384: goes with --concepts"]
    assert refused(call, *of_400m, "--gpu", "h10") == ["--gpu h10: no such GPU in the table; did you mean 'h100'?"]
    assert refused(call, *of_400m, "--price-per-gpu-hour", 0) == ["--price-per-gpu-hour 0: has to be more than 0"]
    assert len(refused(call, *of_400m, "--ranks", 3, "noise_std=-1", "model.preset=4m", "sed=1")) == 2
    assert "3 ranks * 8 micro_batch_rows" in refused(call, *of_400m, "--ranks", 3)[0]
    for command in (("train",), ("launch", "--local", 2)):
        assert refused(call, *command, "configs/train/400m.yaml", "--gpu", "h100", *given) == [
            "--gpu: goes with --dry-run", "--concepts: goes with --dry-run",
        ]  # fmt: skip
    with pytest.raises(SystemExit):
        call(*of_400m, "--concepts", "many")


def test_every_gpu_has_a_name_of_its_own_on_the_command_line():
    assert [gpu_named(gpu.option.upper()) for gpu in GPUS] == list(GPUS)
    with pytest.raises(InputError, match="known: gb300, b300"):
        gpu_named("v")


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_largest_micro_batch_fits_and_the_next_does_not(ranks):
    run = outline(ROOT / "configs/train/1.6b.yaml", ["data.train=not/there"], ranks)
    for gigabytes in (24, 40, 80, 141):
        largest = largest_micro_batch(run.config, run.model, run.ds, ranks, gigabytes)
        rows = run.config.batch.rows_per_step // ranks
        for micro_batch in (each for each in range(1, rows + 1) if rows % each == 0):
            peak = device_peak(run.config, run.model, run.ds, ranks, micro_batch)
            assert (peak <= USABLE * gigabytes * 1e9) == (largest is not None and micro_batch <= largest)


def test_what_is_offloaded_is_not_on_the_device_but_on_the_host(plan):
    kept, offloaded = (plan(*PAPER, f"deepspeed=ds_configs/{name}.json") for name in ("zero2_bf16", "zero2_offload"))
    assert kept["fits"].startswith("micro_batch_rows up to none / 2 / 16 / 32 on 24 / 40 / 80 / 141 GB")
    assert "none" not in offloaded["fits"]
    assert offloaded["host"].startswith("memory   18.4 GiB per rank for what is offloaded there")


def test_a_micro_batch_too_large_for_the_gpu_is_a_warning(plan):
    lines = plan(*PAPER, "--ranks", 8, "--gpu", "rtx-4090", "batch.micro_batch_rows=8")
    assert lines["warning:"] == "batch.micro_batch_rows: 8 does not fit RTX 4090 (24 GB); at most 4 will do"
    assert "warning:" not in plan(*PAPER, "--ranks", 8, "--gpu", "rtx-4090", "batch.micro_batch_rows=4")
    assert "none / " in plan(*PAPER, "--gpu", "rtx-4090")["fits"]
    assert "use more ranks, ZeRO 2 or 3" in plan(*PAPER, "--gpu", "rtx-4090")["warning:"]


RULES = [
    ({"every": 10, "keep": 3}, 100),
    ({"every": 10, "keep": 3}, 95),
    ({"every": 10, "keep": 20}, 100),
    ({"every": 10, "keep": 2, "keep_every": 30}, 200),
    ({"every": 10, "keep": 1, "keep_every": 20}, 95),
    ({"every": 10, "keep": 3, "keep_every": 25}, 200),
    ({"every": None, "keep": 3}, 40),
    ({"every": 500, "keep": 3}, 40),
]


@pytest.mark.parametrize(("rules", "total"), RULES)
def test_checkpoints_on_the_disk_are_those_that_the_rules_keep(rules, total, tmp_path):
    config = CheckpointConfig(**rules)
    most = 0
    for step in range(1, total + 1):
        if step == total or (config.every and step % config.every == 0):
            folder = tmp_path / "checkpoints" / folder_name(step)
            folder.mkdir(parents=True)
            (folder / "COMPLETE").write_text(json.dumps({"files": {}}))
            most = max(most, len(list_checkpoints(tmp_path)))
            retain(tmp_path, config)
    assert checkpoints_on_disk(config, total) == (len(list_checkpoints(tmp_path)), most)


def test_checkpoints_by_the_clock_are_as_many_as_may_be():
    rules = CheckpointConfig(every=1000, every_minutes=30, keep=3, keep_every=25_000)
    assert checkpoints_on_disk(rules, 250_000) == (13, 14)


@pytest.mark.parametrize(
    ("ds", "ranks", "per_parameter"),
    [
        ("zero1_bf16", 1, 14),
        pytest.param("zero2_fp32", 2, 16, marks=pytest.mark.slow),
        pytest.param("zero3_bf16", 2, 12, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_has_the_size_that_a_plan_names(trained, ds, ranks, per_parameter):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = trained(
        ranks, deepspeed=f"ds_configs/{ds}.json", steps=2, model={"preset": "quickstart", "embed_dim": 16, **sizes}
    )
    (checkpoint,) = list_checkpoints(run_dir(config))
    assert isinstance(checkpoint, Checkpoint)
    written = sum(entry["bytes"] for entry in checkpoint.files().values())
    state = checkpoint.state()
    expected = checkpoint_bytes(count_parameters(ModelSizes(**state["model"])), state["deepspeed"])
    assert expected == per_parameter * count_parameters(ModelSizes(**state["model"]))
    assert written == pytest.approx(expected, rel=0.05)  # names, shapes, alignment


def test_launch_plans_for_the_workers_that_it_would_start(call, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("worker-0 slots=8\nworker-1 slots=8\n")
    for way, ranks in ((("--local", 8), 8), (("--hostfile", hosts), 16), (("--mpi", 4), 4)):
        code, planned, err = call("launch", *way, *PAPER, "--dry-run", "--gpu", "h200")
        assert code == 0, err
        assert planned == call("train", *PAPER, "--dry-run", "--ranks", ranks, "--gpu", "h200")[1]
    source = ("configs/prepare/fineweb_edu_10bt.yaml", "--documents", "9.7M", "--rate", "5000")
    code, planned, err = call("launch", "--local", 8, *source, "--dry-run")
    assert code == 0, err
    assert planned == call("prepare", *source, "--dry-run", "--ranks", 8)[1]
    assert refused(call, "launch", "--local", 8, *source, "--dry-run", "--concepts", 5) == [
        "--concepts: is not for a preparation; leave it out"
    ]
    assert refused(call, "launch", "--local", 8, *PAPER, "--dry-run", "--rate", 5) == [
        "--rate: is not for a run; leave it out"
    ]
    assert refused(call, "launch", "--local", 0, *PAPER, "--dry-run") == [
        "--local 0: the number of processes has to be 1 or more"
    ]


def test_doctor_prints_the_plan_of_a_run_whose_data_is_missing_which_is_no_mistake(call, make_config, tmp_path):
    config = make_config(data={"train": str(tmp_path / "none")})
    code, out, err = call("doctor", config)
    assert (code, err) == (0, "")
    assert f"\ndata          not there yet: {tmp_path}/none\n" in out
    assert "\ncheckpoint    " in out
    code, out, err = call("doctor", config, "--concepts", "10k")
    assert (code, err) == (0, "")
    assert "10,000 concepts of 16 (--concepts)" in out
    for mistake, line in (("seed=-1", f"{config}: seed: "), ("run_dir=/proc/self/run", f"{config}: run_dir: ")):
        code, out, err = call("doctor", config, mistake)
        assert code == 2
        assert [each.startswith(line) for each in err.splitlines()] == [True]


def test_a_dataset_is_found_in_the_folder_of_its_preparation(call, make_config, concepts, tmp_path):
    (tmp_path / "both").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "both" / split).symlink_to(concepts[split])
    both = tmp_path / "both"
    config = make_config(data={"train": str(both), "validation": str(both), "row_length": 32, "max_segment": 16})
    expected = [
        f"{config}: data.{split}: {both}: is a folder of datasets: give {both}/train or {both}/validation instead"
        for split in ("train", "validation")
    ]
    for command in (("train",), ("train", "--dry-run"), ("launch", "--local", 2)):
        assert refused(call, *command, config) == expected


def test_a_folder_that_cannot_be_written_to_is_found_by_trying(call, make_config):
    """root may write everywhere by its permissions."""
    config = make_config(run_dir="/proc/self/run")
    for command in (("train",), ("train", "--dry-run"), ("launch", "--local", 2)):
        (line,) = refused(call, *command, config)
        assert line.startswith(f"{config}: run_dir: /proc/self/run: /proc/self cannot be written to: ")


def test_more_workers_than_processors_are_a_warning(capsys, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    task = preparation_task(load(PrepareConfig, ROOT / "configs/prepare/quickstart.yaml"))
    task.check_local(2)
    assert capsys.readouterr().err == ""
    task.check_local(16)
    warning = "warning: {} workers (or threads) slow each other down on 2 processor(s); use 2\n"
    assert capsys.readouterr().err == warning.format(16)
    monkeypatch.undo()
    call = ("prepare", "configs/prepare/text_files.yaml", "source.paths=[none/*]", "processes=1", "encoder.threads=999")
    assert finish(start(*call, CUDA_VISIBLE_DEVICES=""))[2].startswith("warning: 999 workers (or threads) slow each ")


def test_launch_says_what_it_starts_before_torch_is_imported(make_config, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "torch/version.py").write_text("cuda = None")
    config = make_config(batch={"rows_per_step": 8, "micro_batch_rows": 1}, steps=2)
    code, out, err = finish(start("launch", "--local", "8", config, PYTHONPATH=f"{tmp_path}:{ROOT}"))
    assert (code, out) == (1, f"{run_dir(config)}: starting 8 workers; log: {run_dir(config)}/log.txt\n")
    assert "no torch here" in err


def test_sizes_and_their_defaults_are_those_of_the_model():
    """Plans are made without transformers and torch."""
    from lcm_ds.model.config import BaseLCMConfig

    assert BaseLCMConfig().sizes() == ModelSizes().sizes()
    assert {name: BaseLCMConfig(**sizes).sizes() for name, sizes in PRESETS.items()} == {
        name: ModelSizes(**sizes).sizes() for name, sizes in PRESETS.items()
    }
    assert load(TrainConfig, ROOT / "configs/train/quickstart.yaml").model.preset in PRESETS
