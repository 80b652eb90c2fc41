"""A run on two datasets, one of which has a shard that cannot be read: trained, evaluated, traced, and moved."""

import json
import shutil

import pytest
from runs import finish, metrics, run_dir, start

from lcm_ds.cli import main
from lcm_ds.data.format import open_dataset
from lcm_ds.errors import InputError
from lcm_ds.files import OpenFile
from lcm_ds.train.check import check
from lcm_ds.train.trace import trace


@pytest.fixture(scope="module")
def mixture(concepts, synthetic_dataset, make_config, tmp_path_factory):
    """A finished run of 12 steps, its two datasets, and what it printed; the second has a bad shard."""
    ours = concepts["train"]
    damaged = tmp_path_factory.mktemp("mixture") / "damaged"
    shutil.copytree(synthetic_dataset(documents=40, embed_dim=16, seed=3), damaged)
    shard = damaged / open_dataset(damaged).shards[1].name
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    config = make_config(
        data={
            "train": [{"path": str(ours), "weight": 3}, {"path": str(damaged), "weight": 1}],
            "validation": str(damaged),
            "row_length": 32,
            "max_segment": 16,
            "on_bad_shard": "skip",
        },
        steps=12,
        log={"every": 7},
        checkpoint={"every": 5},
        evaluate={"every": 12},
    )
    code, out, err = finish(start("train", config))
    assert code == 0, out + err
    return config, ours, damaged, out


def test_the_shares_of_a_mixture_are_those_of_its_weights_and_are_printed(mixture):
    _, ours, damaged, out = mixture
    totals = [sum(shard.concepts for shard in open_dataset(path, skip_bad=True).shards) for path in (ours, damaged)]
    assert (
        f"reads {ours} ({totals[0]:,} concepts, 6 of 8 lanes), {damaged} ({totals[1]:,} concepts, 2 of 8 lanes)" in out
    )


def test_what_is_saved_has_been_reported(mixture):
    """Or a run that goes on from a checkpoint would never have logged the losses just before it."""
    losses = metrics(mixture[0], "losses")
    assert {step: len(some) for step, some in losses.items()} == {5: 5, 7: 2, 10: 3, 12: 2}


def test_a_run_that_went_past_a_bad_shard_can_be_evaluated(mixture):
    config, _, damaged, _ = mixture
    code, _, err = finish(start("evaluate", run_dir(config)))
    assert code == 0, err
    shard = open_dataset(damaged, skip_bad=True).shards[1].name
    log = (run_dir(config) / "log.txt").read_text()
    assert shard in log
    assert "left out" in log
    assert metrics(config, "missing_concepts")[12] > 0
    figures = json.loads((run_dir(config) / "evaluation.json").read_text())
    assert 0 < figures["targets"] == metrics(config, "val_targets")[12]


def test_a_trace_says_which_dataset_a_document_is_of(mixture, capsys):
    config, ours, damaged, _ = mixture
    assert main(["trace", str(config), "--step", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()[1:]
    for lane in range(8):
        path = ours if lane < 6 else damaged
        lines = [line for line in printed if line.startswith(f"lane {lane:>3}  ")]
        assert lines
        assert all(line.startswith(f"lane {lane:>3}  {path}  shard-") for line in lines)


def test_a_trace_of_a_moved_run_has_its_losses_and_says_which_are_not_finite(mixture, tmp_path, capsys):
    config, *_ = mixture
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(run_dir(config) / "config.yaml", moved)
    (moved / "metrics.jsonl").write_text('{"step": 2, "losses": [0.5, null]}\n')
    trace(moved, [], 0, 2)
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert heads == ["step 0  loss 0.5", "step 1  loss not finite", "step 2  loss not logged"]


def test_a_trace_reads_no_shard_in_full(mixture, monkeypatch):
    monkeypatch.setattr(OpenFile, "sha256", lambda file: pytest.fail(f"{file.path} was read"))
    monkeypatch.setattr(OpenFile, "read_ahead", lambda file: pytest.fail(f"{file.path} was read"))
    assert trace(mixture[0], [], 3)[0]


def test_datasets_that_do_not_belong_together_are_refused_with_both_named(
    concepts, synthetic_dataset, make_config, tmp_path
):
    ours, wide = concepts["train"], synthetic_dataset(documents=10, embed_dim=24)
    other = tmp_path / "other"
    shutil.copytree(synthetic_dataset(documents=20, embed_dim=16, seed=4), other)
    described = json.loads((other / "dataset.json").read_text())
    described["encoder"]["revision"] = "b"
    (other / "dataset.json").write_text(json.dumps(described))
    for path, said in ((wide, ["24 dimensions", "of 16;"]), (other, ["'revision': 'b'", "'revision': None"])):
        config = make_config(data={"train": [{"path": str(ours)}, {"path": str(path)}]})
        with pytest.raises(InputError) as caught:
            check(config, [], 1)
        assert any(
            all(words in line for words in (f"{config}: data: {path}", str(ours), *said))
            for line in caught.value.mistakes
        )
