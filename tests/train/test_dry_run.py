"""Dry runs, and traces of steps."""

import json

import pytest
from runs import run_dir

from lcm_ds.data.format import open_dataset
from lcm_ds.data.plan import Plan
from lcm_ds.data.supervised import source_of


@pytest.fixture
def dry_run(call):
    def dry_run(*arguments):
        code, out, err = call("train", *arguments, "--dry-run")
        assert code == 0, err
        return out

    return dry_run


def test_a_dry_run_prints_sizes_memory_and_steps_and_starts_nothing(dry_run, make_config, concepts):
    config = make_config()
    out = dry_run(config, "--ranks", 2, "steps=30")
    printed = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert printed["layers.0-1.mlp.gate_proj.weight"] == "64 × 32"
    # ends 2 · (16·32) + 32 + 16, a layer 4 · (32² + 32) + 3 · 32 · 64 + 2 · 64 + 32 + 2 · 32, the last norm 32
    layer = 4 * (32 * 32 + 32) + 3 * 32 * 64 + 2 * 64 + 32 + 2 * 32
    assert printed["parameters"] == f"{2 * 16 * 32 + 32 + 16 + 2 * layer + 32:,} in float32"
    assert printed["step"] == "256 concepts: 2 rank(s) × 1 micro-batch(es) × 4 rows × 32"
    total = json.loads((concepts["train"] / "dataset.json").read_text())["totals"]["concepts"]
    assert printed["data"] == f"{total:,} concepts in 30 shards: {total / 256:,.1f} steps per epoch"
    read = f"{30 * 256:,} concepts, {30 * 256 / total:.2f} epochs"
    assert printed["run"] == f"30 steps, {read}; warm-up 5 steps, 16.7% of the run: {run_dir(config)}"
    assert "warning" not in printed
    assert "\nwarning: optim.schedule.warmup_steps: 5 is 25% of the run's 20 steps; " in dry_run(config, "steps=20")
    assert printed["NCCL"] == "at most 0.75 GiB more per rank on GPUs, for its buffers"
    assert "\nNCCL " not in dry_run(config, "steps=30")
    assert sum(line.startswith("ZeRO") for line in out.splitlines()) == 4
    assert next(line for line in out.splitlines() if "this run" in line).startswith("ZeRO 2")
    assert not run_dir(config).exists()


def test_a_dry_run_prints_how_many_targets_of_supervised_documents_are_reached(dry_run, make_config, synthetic_dataset):
    data = {"train": str(synthetic_dataset(documents=40, lengths=(8, 24), given=5)), "row_length": 32}
    dataset = open_dataset(data["train"])
    assert dataset.index is not None
    lengths = [length for shard in range(len(dataset.shards)) for length in dataset.index.lengths(shard).tolist()]
    total, reached = (sum(min(length, longest) - 5 for length in lengths) for longest in (32, 16))
    assert reached < total
    for max_segment, expected in (
        (24, f"an epoch reaches {total} of {total} targets"),
        (16, f"an epoch reaches {reached} of {total} targets; {total - reached} are lost: documents longer than "
             "data.max_segment 16"),
    ):  # fmt: skip
        data["max_segment"] = max_segment
        lines = dry_run(make_config(data={**data, "validation": data["train"]})).splitlines()
        assert f"targets       {dataset.path}: {expected}" in lines
        assert f"targets       {dataset.path}: {expected.replace('an epoch', 'validation')}" in lines
        (rows,) = [line for line in lines if line.startswith("data ")]
        plan = Plan([source_of(dataset, 32, max_segment)], 7, 8, 32)
        assert rows.endswith(
            f"{plan.row_slots / 256:.1f} steps per epoch, rows {sum(lengths) / plan.row_slots:.0%} full"
        )


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("mini", 1), ("150m", 8), ("400m", 8), ("1.6b", 32), ("1.6b_fp8", 32), ("1.6b_100bt", 8), ("7b", 64)],
)
def test_every_shipped_config_can_be_built(dry_run, name, ranks, synthetic_dataset, tmp_path):
    data = synthetic_dataset(documents=10, embed_dim=1024, lengths=(2, 8))
    places = [f"data.train={data}", f"data.validation={data}", f"run_dir={tmp_path / 'run'}"]
    places.append("optim.schedule.warmup_steps=0")  # an epoch of so little data is shorter than the warm-up
    out = dry_run(f"configs/train/{name}.yaml", *places, "--ranks", ranks)
    assert "<- this run" in out
    if name == "1.6b":
        assert "1,649,185,792" in out


@pytest.mark.slow
def test_steps_are_traced_for_perfetto(trained):
    config = trained(
        2, train={"profile_steps": [3, 5], "compile": True}, deepspeed="ds_configs/zero3_fp32.json", steps=8
    )
    (path,) = (run_dir(config) / "profile").iterdir()
    assert path.name == "steps_3-5.pt.trace.json"
    events = json.loads(path.read_text())["traceEvents"]
    products = sum(event.get("name") == "aten::scaled_dot_product_attention" for event in events)
    assert products == 3 * 2  # steps and layers
    assert "train.compile: no layers: ZeRO-3" in (run_dir(config) / "log.txt").read_text()
