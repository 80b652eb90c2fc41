"""An exported model is bit-identical to the trained one, in a folder that loads without DeepSpeed."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from runs import finish, metrics, run_dir, start

from lcm_ds import BaseLCM
from lcm_ds.checkpoint.format import load_model
from lcm_ds.convert.export import export
from lcm_ds.errors import InputError
from lcm_ds.files import sha256_of
from lcm_ds.metrics import VERSION


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """(config of a run, the folder of `lcm-ds export`)."""
    config = trained(2)
    output = tmp_path_factory.mktemp("export") / "new" / "model"
    code, out, err = finish(start("export", run_dir(config), output))
    assert code == 0, out + err
    assert "40 steps" in out
    return config, output


def test_every_weight_is_the_trained_one(exported):
    config, output = exported
    trained_model, _, step = load_model(run_dir(config))
    assert step == 40
    loaded = BaseLCM.from_pretrained(output)
    assert loaded.config.sizes() == trained_model.config.sizes()
    weights = trained_model.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.normalizer.scale.dtype == torch.float32
    assert not torch.equal(loaded.normalizer.scale, torch.ones_like(loaded.normalizer.scale))


def test_every_file_has_the_mode_that_the_umask_gives(exported, tmp_path):
    _, output = exported
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in output.rglob("*.*")} == {(tmp_path / "new").stat().st_mode}


def test_the_cards_example_runs_without_deepspeed_and_the_packages_of_prepare(exported):
    _, output = exported
    (snippet,) = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)
    assert len(snippet.splitlines()) <= 10
    missing = ("deepspeed", "spacy", "datasets", "sentence_transformers")
    block = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [
        sys.executable,
        "-c",
        f"{block}{snippet}\nprint(next_concept.shape, bool(next_concept.isfinite().all()))",
    ]
    done = subprocess.run(command, cwd=output.parent, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "torch.Size([1, 16]) True", done.stderr


def test_the_card_describes_how_the_model_was_made(exported, concepts):
    config, output = exported
    files = ["README.md", "concepts.json", "config.json", "model.safetensors"]
    assert sorted(path.name for path in output.iterdir()) == files
    card = (output / "README.md").read_text()
    assert "| steps | 40 |" in card
    assert f"| concepts seen | {metrics(config, 'concepts')[40]:,} |" in card
    assert f"{metrics(config, 'val_loss')[40]:.4f}" in card
    assert f"{metrics(config, 'val_cosine')[40]:.4f}" in card
    assert str(concepts["train"]) in card
    assert "synthetic, rotation-16" in card
    assert "SONAR" not in card


def test_an_evaluation_of_this_checkpoint_is_in_the_card_and_no_other(trained, tmp_path):
    run, copy = run_dir(trained(2)), tmp_path / "run"
    shutil.copytree(run, copy)
    scores = {"Base-LCM": {"normalised": {"mse": 0.123456, "variance_ratio": 0.5}, "raw": {"l2": 1.5, "ca": None}}}
    difference = {"of": "Base-LCM", "less": "ridge from the last", "value": 0.0141, "interval": [0.0119, 0.0164]}
    found = {"dataset": "texts", "documents": 3, "targets": 1234, "scores": scores, "difference": difference}
    complete = sha256_of(copy / "checkpoints" / "step_00000040" / "COMPLETE")
    for name, checkpoint, version in (
        ("its", complete, VERSION),
        ("another", "0" * 64, VERSION),
        ("older", complete, VERSION - 1),
    ):
        written = {**found, "checkpoint": checkpoint, "format_version": version}
        (copy / "evaluation.json").write_text(json.dumps(written))
        export(copy, tmp_path / name)
    card = (tmp_path / "its" / "README.md").read_text()
    assert "on texts, 3 documents, 1,234 targets:" in card
    assert "| Base-LCM | 0.1235 | 1.5 | – | – | 0.5 |" in card
    assert "Base-LCM minus ridge from the last, the best baseline: mse +0.0141 (95 %: +0.0119 to +0.0164)." in card
    for name in ("another", "older"):
        assert "1,234" not in (tmp_path / name / "README.md").read_text()


def test_sonars_licence_is_named_if_the_concepts_are_sonars(trained, concepts, tmp_path):
    info = (concepts["train"] / "dataset.json").read_text()
    as_sonar = info.replace('"name": "synthetic"', '"name": "sonar"')
    assert as_sonar != info
    copy = tmp_path / "run"
    copy.mkdir()
    sonar = tmp_path / "dataset"
    sonar.mkdir()
    for path in concepts["train"].iterdir():
        (sonar / path.name).symlink_to(path)
    (sonar / "dataset.json").unlink()
    (sonar / "dataset.json").write_text(as_sonar)
    run = run_dir(trained(2))
    for path in run.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "config.yaml").unlink()
    (copy / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(concepts["train"]), str(sonar)))
    export(copy, tmp_path / "model")
    assert "CC-BY-NC-4.0" in (tmp_path / "model" / "README.md").read_text()


def test_a_folder_that_is_not_empty_is_not_changed(exported, trained, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        export(run_dir(trained(2)), tmp_path)
    with pytest.raises(InputError, match="is there already"):
        export(run_dir(trained(2)), tmp_path / "precious")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_empty_folder_is_taken_and_nothing_else_is_left_behind(trained, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "of-a-killed-export").touch()
    export(run_dir(trained(2)), tmp_path / "model", step=40)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "of-a-killed-export").exists()


def test_missing_runs_and_checkpoints_cannot_be_exported(trained, tmp_path):
    with pytest.raises(InputError, match="no run here"):
        export(tmp_path / "none", tmp_path / "model")
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        export(run_dir(trained(2)), tmp_path / "model", step=7)
    assert not list(tmp_path.iterdir())
