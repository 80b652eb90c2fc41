"""The functions for notebooks do the same as the commands, with configs as objects."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lcm_ds import BaseLCM, api, cli
from lcm_ds.config import TrainConfig, load
from lcm_ds.data.format import open_dataset

REPOSITORY = Path(__file__).parents[2]


def test_a_run_is_an_object_and_the_output_of_its_workers_is_printed(make_config, capsys):
    config = load(TrainConfig, make_config(steps=4, evaluate={"every": 2, "rows": 4}))
    run = api.train(config, processes=1)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step 4/4") for line in lines)
    assert (run.step, run.stopped) == (4, False)
    assert [line["step"] for line in run.metrics() if "val_loss" in line] == [2, 4]
    assert api.train(config, processes=1) == run
    assert f"{run.path}: already trained for 4 steps, nothing to do" in capsys.readouterr().out


def test_a_run_that_was_asked_to_stop_is_marked(make_config, monkeypatch):
    monkeypatch.setattr("lcm_ds.launcher.launch.launch", lambda *_, **__: 75)
    assert api.train(load(TrainConfig, make_config())).stopped


def test_errors_in_an_object_are_raised_without_the_name_of_a_file(make_config):
    config = load(TrainConfig, make_config())
    wrong = config.model_copy(update={"data": config.data.model_copy(update={"validation": "gone"})})
    with pytest.raises(api.InputError) as refused:
        api.train(wrong)
    (line,) = refused.value.errors
    assert line.startswith("config: data.validation: gone")


def test_a_plan_is_the_lines_of_a_dry_run(make_config, capsys):
    path = make_config(steps=4)
    assert cli.main(["train", str(path), "--dry-run", "--ranks", "2", "--gpu", "h100", "--concepts", "10k"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert api.plan(load(TrainConfig, path), 2, gpu="h100", concepts=10_000) == printed
    preparation = load(api.PrepareConfig, "configs/prepare/fineweb_edu_10bt.yaml")
    lines = api.plan(preparation, 8, sentences=1_000_000, rate=1000.0, price_per_gpu_hour=2.0)
    assert any(line.startswith("hours         0.0347 on 8; 0.278 GPU-hours") for line in lines), lines
    with pytest.raises(api.InputError, match="give only one of them"):
        api.plan(preparation, rate=1.0, measure=1.0)


def test_a_dataset_is_looked_at_by_its_lines(concepts):
    found = api.inspect(concepts["train"], verify=True)
    (summary,) = found.values()
    assert summary["concepts"].startswith(f"{open_dataset(concepts['train']).info.totals.concepts:,} of 16 × ")
    with pytest.raises(api.InputError, match="no such dataset folder"):
        api.inspect(concepts["train"].parent / "gone")


def test_a_run_is_exported(make_config, tmp_path):
    run = api.train(load(TrainConfig, make_config(steps=2)))
    model = BaseLCM.from_pretrained(api.export(run, tmp_path / "model", dtype="bfloat16"))
    assert model.config.embed_dim == 16
    with pytest.raises(api.InputError, match="step 7"):
        api.export(run, tmp_path / "other", step=7)


@pytest.mark.slow
def test_the_notebook_goes_the_whole_way_with_two_figures(tmp_path):
    notebook = nbformat.read(REPOSITORY / "examples" / "first_run.ipynb", as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    # Tables are displayed, lines are printed.
    printed = "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "step 40/40" in printed
    assert "Base-LCM less" in printed
    assert BaseLCM.from_pretrained(tmp_path / "first_run" / "model").num_parameters() == 5_648_768
