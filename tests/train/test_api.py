"""The functions for notebooks do the same as the commands, with configs as objects."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcm_ds import api
from lcm_ds.config import TrainConfig, load

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


@pytest.mark.slow
def test_the_example_runs_from_text_to_figures(tmp_path):
    command = [sys.executable, "examples/first_run.py", str(tmp_path)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "step  60: validation loss" in done.stdout
    assert (tmp_path / "run" / "evaluation.json").is_file()
