"""Input errors: exit code 2, all errors at once, a line each, no traceback, no partial output."""

import json
import shutil

import numpy as np
import pytest
from runs import finish, run_dir, start

from lcm_ds.data.format import DatasetInfo, commit, open_dataset, write_normalizer
from lcm_ds.data.format import finish as finish_dataset
from lcm_ds.data.plan import Plan
from lcm_ds.data.shard import Shard
from lcm_ds.data.supervised import source_of
from lcm_ds.data.writer import Document, write_shard

ENCODER = {"name": "synthetic", "model": "rotation-16", "revision": None}  # that of synthetic_dataset


def errors(code, out, err):
    """The lines on stderr of a command that has to end with exit code 2."""
    assert code == 2, out + err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == len(set(lines)), "an error is reported once"
    return lines


@pytest.fixture
def refused(call):
    """refused(*arguments) -> the lines on stderr of a call that has to end with exit code 2."""
    return lambda *arguments: errors(*call(*arguments))


@pytest.mark.parametrize("verb", [["train"], ["launch", "--local", "2"]], ids=["train", "launch"])
def test_errors_of_all_files_are_reported_together(refused, make_config, tmp_path, verb):
    bad_json = tmp_path / "ds.json"
    bad_json.write_text(json.dumps({"zero_optimization": {"stgae": 2}, "gradient_cliping": 1.0}))
    config = make_config(
        data={"train": "no/such/dataset", "validation": "nor/this", "row_length": 1},
        deepspeed=str(bad_json),
        sped=3,
    )
    lines = refused(*verb, config, "noise_std=-1")
    text = "\n".join(lines)
    for expected in (
        "no/such/dataset",
        "nor/this",
        "row_length",
        "noise_std",
        "sped: unknown key; did you mean 'seed'?",
        "stgae: unknown key; did you mean 'stage'?",
        "gradient_cliping: unknown key; did you mean 'gradient_clipping'?",
    ):
        assert expected in text
    assert len(lines) == 7
    assert not run_dir(config).exists()


def test_a_dataset_of_other_dimensions_is_refused_with_both_named(refused, make_config, synthetic_dataset):
    other = synthetic_dataset(documents=10, embed_dim=24)
    config = make_config(data={"train": str(other)})
    lines = refused("train", config)
    assert len(lines) == 1
    assert "16" in lines[0]
    assert "24" in lines[0]
    assert str(other) in lines[0]


def test_rows_that_the_ranks_do_not_divide_are_refused_with_alternatives(refused, make_config):
    config = make_config(batch={"rows_per_step": 8, "micro_batch_rows": 4})
    lines = refused("launch", "--local", 3, config)
    assert len(lines) == 1
    assert "rows_per_step" in lines[0]
    assert "3" in lines[0]
    assert "1, 2" in lines[0]


def dataset_of(lengths, folder):
    """A dataset of documents with these lengths, ten per shard; the last shard has the rest."""
    documents = [
        Document(f"{i:02d}", str(i), "tests", ["s"] * n, np.full((n, 16), i, np.float32)) for i, n in enumerate(lengths)
    ]
    for some in (documents[:10], documents[10:20], documents[20:30], documents[30:]):
        commit(folder, write_shard(folder, f"{some[0].key}.tar", some))
    write_normalizer(folder, np.zeros(16), np.ones(16), {})
    finish_dataset(folder, DatasetInfo(encoder=ENCODER, embed_dim=16, dtype="float16"))
    return folder


def test_datasets_without_targets_are_refused_by_whatever_checks_a_run(
    call, refused, make_config, synthetic_dataset, tmp_path
):
    supervised = synthetic_dataset(documents=10, lengths=(22, 26), given=20)
    single = dataset_of([1] * 31, tmp_path)
    sizes = {"row_length": 32, "max_segment": 16}
    config = make_config(data={"train": str(supervised), "validation": str(supervised), **sizes})
    why = (
        f"{supervised}: holds nothing to predict: sources have 20 concepts or more, and a target is only reached "
        "within data.max_segment 16; a larger value, or shorter sources, will do"
    )
    lines = [f"{config}: data.train: {why}", f"{config}: data.validation: {why}"]
    for command in (["train"], ["train", "--dry-run"], ["launch", "--local", "2"], ["doctor"]):
        assert refused(*command, config) == lines
    assert call("train", config, "--dry-run", "data.max_segment=21")[0] == 0
    config = make_config(data={"train": str(single), **sizes})
    assert refused("train", config) == [
        f"{config}: data.train: {single}: holds nothing to predict: each of its documents is a single concept"
    ]


def test_a_run_whose_steps_have_no_targets_ends_with_an_error(make_config, tmp_path):
    """Known only at the end: one document of 41 has a target, and neither steps nor validation reach it."""
    dataset_of([1] * 40 + [2], tmp_path)
    source = source_of(open_dataset(tmp_path), 4, 128)
    plans = {seed: Plan([source], seed, 2, 4) for seed in range(9)}
    config = make_config(
        seed=next(
            s for s, plan in plans.items() if all(plan.segments(step, range(2)).stop.max() == 1 for step in (0, 1))
        ),
        data={"train": str(tmp_path), "validation": str(tmp_path), "row_length": 4},
        batch={"rows_per_step": 2, "micro_batch_rows": 2},
        evaluate={"every": 1, "rows": 1},
        checkpoint={"every": 2},
        log={"every": 1, "samples": 0},
        optim={"lr": 1e-3},
        steps=2,
    )
    code, out, err = finish(start("train", config))
    assert errors(code, out, err) == [f"{run_dir(config)}: none of the 2 steps had a target: nothing was learned"]
    assert [line.split("  lr")[0] for line in out.splitlines() if "  lr" in line] == [
        "step 1/2  loss       –",
        "step 2/2  loss       –",
    ]
    assert "step 1/2  validation loss       –  cosine      –" in out
    assert "best" not in out
    lines = [json.loads(line) for line in (run_dir(config) / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [(line["loss"], line["loss_sum"], line["losses"], line["targets"]) for line in trained] == [
        (None, None, [None], 0)
    ] * 2
    (validated,) = [line for line in lines if "val_loss" in line]
    assert (validated["val_loss"], validated["val_targets"]) == (None, 0)
    assert not list(run_dir(config).glob("checkpoints/step_*"))


def test_a_shard_whose_bytes_changed_is_refused_by_name(refused, make_config, concepts, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(concepts["train"], copy)
    victim = sorted(copy.glob("*.tar"))[0]
    for path in copy.glob("*.tar"):
        content = bytearray(path.read_bytes())
        for offset in Shard(path).offsets:
            content[offset] ^= 1
        path.write_bytes(content)
    config = make_config(data={"train": str(copy), "row_length": 32, "max_segment": 16})
    lines = errors(*finish(start("train", config)))
    assert any("has another checksum than documents.idx lists" in line and str(copy) in line for line in lines)
    victim.write_bytes(victim.read_bytes()[:-512])
    lines = refused("train", config)
    assert any(victim.name in line and "bytes" in line for line in lines)


def test_a_run_dir_that_cannot_be_a_folder_is_refused_before_anything_starts(refused, make_config, tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(run_dir=str(tmp_path / "file" / "run"))
    for call in (("train", config), ("train", config, "--dry-run"), ("launch", "--local", 2, config)):
        assert refused(*call) == [f"{config}: run_dir: {tmp_path}/file/run: {tmp_path}/file is a file, not a folder"]


def test_a_step_that_the_run_does_not_have_cannot_be_traced(refused, make_config, tmp_path):
    assert refused("trace", tmp_path, "--step", 1) == [f"{tmp_path}: no run here (config.yaml is missing)"]
    config = make_config()
    assert refused("trace", config, "--step", 40) == ["step 40: this run has steps 0 to 39"]
    assert len(refused("trace", config, "--range", -1, 40)) == 2
    assert "comes before the first" in refused("trace", config, "--range", 5, 4)[0]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_a_warm_up_as_long_as_the_run_is_refused(refused, make_config, name):
    config = make_config(optim={"lr": 1e-3, "schedule": {"name": name, "warmup_steps": 40}})
    expected = "the run has 40 steps and would never reach optim.lr; the LCM paper's 4 % would be 1"
    for command in (("train", config), ("train", config, "--dry-run"), ("launch", "--local", 2, config)):
        assert refused(*command) == [f"{config}: optim.schedule.warmup_steps: 40: {expected}"]


def test_step_settings_without_effect_are_refused(refused, make_config):
    config = make_config(train={"recompute_every": 2, "profile_steps": [50, 60]})
    lines = refused("train", config)
    assert len(lines) == 2
    assert lines[0].endswith("train.recompute_every: 2: has no effect without train.recompute: layer")
    assert "train.profile_steps: [50, 60]: the run has steps 0 to 39" in lines[1]
    block = {"zero_optimization": {"stage": 1}, "activation_checkpointing": {}}
    both = make_config(train={"recompute": "swiglu"}, deepspeed=block)
    expected = f'contradicts "activation_checkpointing" in {both}: deepspeed, which recomputes whole layers'
    assert refused("train", both) == [f"{both}: train.recompute: swiglu: {expected}; remove one of them"]
    lines = refused(
        "train", config, "train.profile_steps=[9,3]", "optim.max_grad_norm=1", "deepspeed=ds_configs/zero1_muon.json"
    )
    assert any("train.profile_steps" in line and "[9, 3]" in line for line in lines)
    assert "--ranks 4: has to be 1 or more, and goes with --dry-run" in refused("train", config, "--ranks", 4)[0]
    config = make_config(optim={"lr": 1e-3, "max_grad_norm": 1.0}, deepspeed="ds_configs/zero1_muon.json")
    lines = refused("train", config)
    assert len(lines) == 1
    assert "optim.max_grad_norm: 1.0: has to be 0 with Muon" in lines[0]
