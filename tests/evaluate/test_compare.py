"""`lcm-ds compare`: several models on the targets that all of them have."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lcm_ds.cli import main
from lcm_ds.data.format import DatasetInfo, commit, finish, write_normalizer
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.errors import InputError
from lcm_ds.evaluate.compare import compare
from lcm_ds.evaluate.run import evaluate
from lcm_ds.model.flops import matrix_weights
from lcm_ds.model.sizes import ModelSizes

EMBED_DIM, LENGTH = 8, 12
ENCODER = {"name": "synthetic", "model": "walks", "revision": None}
MODEL = {"preset": "quickstart", "embed_dim": EMBED_DIM, "hidden_size": 16, "intermediate_size": 32,
         "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip


def make_dataset(folder, documents, seed, scale=1.0):
    """Walks, whose next concept depends on the last one; in books of five."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    made = []
    for number in range(documents):
        steps = random.normal(size=(LENGTH, EMBED_DIM)).astype(np.float32)
        for i in range(1, LENGTH):
            steps[i] = 0.8 * steps[i - 1] + 0.6 * steps[i]
        group = f"book {number // 5}"
        made.append(Document(f"{number:04d}", f"{seed}-{number}", "made", ["A."] * LENGTH, steps, group=group))
    commit(folder, write_shard(folder, "0.tar", made, "float32"))
    write_normalizer(folder, np.zeros(EMBED_DIM), np.full(EMBED_DIM, scale), {})
    source = {"group_column": "book"}
    finish(folder, DatasetInfo(encoder=ENCODER, embed_dim=EMBED_DIM, dtype="float32", source=source))
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A run of 40 steps, and the same after 4, there also with short segments, as runs of their own."""
    folder = tmp_path_factory.mktemp("compared")
    places = {"train": make_dataset(folder / "train", 200, 1), "validation": make_dataset(folder / "validation", 60, 2)}
    mapping = {
        "run_dir": str(folder / "long"),
        "model": MODEL,
        "data": {**{key: str(place) for key, place in places.items()}, "row_length": LENGTH, "max_segment": LENGTH},
        "batch": {"rows_per_step": 8, "micro_batch_rows": 8},
        "optim": {"lr": 1e-2, "schedule": {"warmup_steps": 1}},
        "steps": 40,
        "checkpoint": {"every": 4, "keep": 10},
        "log": {"every": 1},
        "deepspeed": "ds_configs/zero1_fp32.json",
    }
    (folder / "long.yaml").write_text(yaml.safe_dump(mapping))
    command = [sys.executable, "-m", "lcm_ds.cli", "train", str(folder / "long.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, segment in (("short", LENGTH), ("segments", 4)):
        copy = copied(folder / "long", folder / name)
        for checkpoint in sorted((copy / "checkpoints").glob("step_*"))[1:]:
            shutil.rmtree(checkpoint)
        config = yaml.safe_load((copy / "config.yaml").read_text())
        config["data"]["max_segment"] = segment
        (copy / "config.yaml").write_text(yaml.safe_dump(config))
    return {name: folder / name for name in ("short", "long", "segments")}


def copied(run, folder):
    return Path(shutil.copytree(run, folder))


def test_the_scores_are_those_of_an_evaluation_and_differences_are_paired(runs, capsys):
    result = compare([runs["short"], runs["long"]])
    short, long = result["runs"]
    for run, name in ((short, "short"), (long, "long")):
        alone = evaluate(runs[name])
        model = alone["scores"]["Base-LCM"]
        assert run["scores"]["mse"]["value"] == pytest.approx(model["normalised"]["mse"], rel=1e-5)
        assert run["scores"]["mse_raw"]["value"] == pytest.approx(model["raw"]["mse"], rel=1e-5)
        assert run["scores"]["cosine"]["value"] == pytest.approx(model["raw"]["cosine"], rel=1e-5)
        assert run["scores"]["mse"]["interval"] == pytest.approx(
            alone["intervals"]["Base-LCM"]["normalised"]["mse"], rel=1e-5
        )
        best = alone["baselines"]["best"]
        assert run["baseline"]["name"] == best
        assert run["baseline"]["scores"]["mse"]["value"] == pytest.approx(alone["scores"][best]["normalised"]["mse"])
        less = run["baseline"]["model_less_baseline"]["mse"]
        assert less["value"] == pytest.approx(alone["difference"]["value"], abs=1e-5)
        assert less["interval"] == pytest.approx(alone["difference"]["interval"], abs=1e-5)
    difference = long["less_first"]["mse"]
    assert difference["value"] == pytest.approx(long["scores"]["mse"]["value"] - short["scores"]["mse"]["value"])
    assert difference["interval"][0] < difference["value"] < difference["interval"][1] < 0  # it has learned
    # Both models err on the same targets: the difference is known better than either error.
    own = [run["scores"]["mse"]["interval"] for run in (short, long)]
    assert np.ptp(difference["interval"]) < max(map(np.ptp, own))
    assert short["less_first"] == {}
    assert (result["documents"], result["groups"], result["targets"]) == (60, 12, 60 * (LENGTH - 1))


def test_the_cost_is_that_of_the_training(runs):
    short, long = compare([runs["short"], runs["long"]], baselines=False)["runs"]
    assert "baseline" not in long
    assert (short["concepts"], long["concepts"]) == (4 * 8 * LENGTH, 40 * 8 * LENGTH)
    lines = [json.loads(line) for line in (runs["long"] / "metrics.jsonl").read_text().splitlines()]
    assert long["seconds"] == pytest.approx(sum(line["step_time"] for line in lines if "step_time" in line))
    sizes = ModelSizes(**{key: value for key, value in MODEL.items() if key != "preset"})
    seen = (LENGTH + 1) / 2  # of a concept, on average
    attention = 4 * sizes.hidden_size * seen * sizes.num_hidden_layers
    assert long["flops"] == pytest.approx(3 * (2 * matrix_weights(sizes) + attention) * long["concepts"], rel=1e-6)
    assert short["parameters"] == long["parameters"]


def test_only_targets_of_all_models_count(runs, capsys):
    result = compare([runs["short"], runs["segments"]], baselines=False)
    # Segments of 4 have three targets each; the first concepts of the second and third are none.
    assert [run["targets"] for run in result["runs"]] == [60 * 11, 60 * 9]
    assert result["targets"] == 60 * 9
    assert "models have up to 660 targets of their own" in capsys.readouterr().out


def test_with_two_normalisers_only_raw_space_is_compared(runs, tmp_path, capsys):
    assert main(["export", str(runs["short"]), str(tmp_path / "scaled")]) == 0
    weights = load_file(tmp_path / "scaled/model.safetensors")
    weights["normalizer.scale"] *= 2
    save_file(weights, tmp_path / "scaled/model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    result = compare([runs["short"], tmp_path / "scaled"], str(runs["short"].parent / "validation"), baselines=False)
    assert not result["one_normaliser"]
    assert set(result["runs"][1]["less_first"]) == {"mse_raw", "cosine"}
    printed = capsys.readouterr().out
    assert "normalisers differ, so that only errors in raw space can be compared" in printed
    assert "MSE raw" in printed


def test_the_command_prints_a_table_and_writes_json_and_figure(runs, tmp_path, capsys):
    files = ["--json", str(tmp_path / "a.json"), "--figure", str(tmp_path / "a.png")]
    assert main(["compare", str(runs["short"]), str(runs["long"]), *files]) == 0
    printed = capsys.readouterr().out
    assert "60 documents in 12 groups, 660 targets that all models have" in printed
    assert {"short", "long"} <= set(printed.split())
    assert json.loads((tmp_path / "a.json").read_text())["runs"][1]["run"] == str(runs["long"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_exported_models_are_compared_too(runs, tmp_path):
    assert main(["export", str(runs["long"]), str(tmp_path / "model")]) == 0
    data = str(runs["short"].parent / "validation")
    long, exported = compare([runs["long"], tmp_path / "model"], data)["runs"]
    assert exported["less_first"]["mse"]["value"] == pytest.approx(0, abs=1e-6)
    assert (exported["concepts"], exported["seconds"], exported["flops"]) == (None, None, None)
    assert "baseline" in long
    assert "baseline" not in exported


def test_mistakes_are_told_all_at_once(runs, tmp_path, capsys):
    calls = [str(runs["short"]), str(runs["short"]), str(tmp_path / "nothing")]
    assert main(["compare", *calls, "--json", str(tmp_path / "no/a.json")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"--json: {tmp_path}/no/a.json: has to be a file in a folder that is there",
        f"{runs['short']}: is named twice",
        f"{tmp_path}/nothing: no run here (config.yaml is missing) and no exported model (config.json is missing)",
    ]
    assert main(["compare", str(runs["short"])]) == 2
    assert "compare: name two runs or more" in capsys.readouterr().err


def test_runs_of_two_validation_datasets_need_one_to_be_named(runs, tmp_path):
    other = make_dataset(tmp_path / "other", 8, 3)
    assert compare([runs["short"], runs["long"]], str(other), baselines=False)["targets"] == 8 * (LENGTH - 1)
    config = yaml.safe_load((runs["long"] / "config.yaml").read_text())
    config["data"]["validation"] = str(other)
    copy = copied(runs["long"], tmp_path / "copy")
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"copy: is validated on .*other, .*short on .*validation: name one dataset"):
        compare([runs["short"], copy])


def test_documents_without_a_common_target_are_refused(runs, monkeypatch):
    from lcm_ds.evaluate import compare as module

    found = iter([torch.tensor([1, 2]), torch.tensor([3])])

    def errors(*_):
        keys = next(found)
        return [module.TargetErrors(keys, torch.zeros(len(keys), 3))], 1.0

    monkeypatch.setattr(module, "_pass_over_targets", errors)
    with pytest.raises(InputError, match="no target is one of all models"):
        compare([runs["short"], runs["long"]], baselines=False)
