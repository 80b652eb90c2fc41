"""All errors of a config are reported at once, a line each."""

from pathlib import Path

import pytest
import yaml

from lcm_ds.config import PrepareConfig, TrainConfig, dump, load
from lcm_ds.errors import InputError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize(
    "path",
    sorted([*CONFIGS.glob("train/*.yaml"), *CONFIGS.glob("experiments/*/train.yaml")]),
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_every_train_config_loads(path):
    load(TrainConfig, path)


@pytest.mark.parametrize(
    "path",
    sorted([*CONFIGS.glob("prepare/*.yaml"), *CONFIGS.glob("experiments/*/prepare.yaml")]),
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_every_prepare_config_loads(path):
    load(PrepareConfig, path)


def written(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_all_errors_are_reported_at_once_each_on_a_line(tmp_path):
    path = written(
        tmp_path,
        """
run_dir: a
modell: {preset: quickstart}
model: {presett: quickstart}
data: {train: [{path: a, wieght: 2}], row_length: 1}
batch: {rows_per_step: 16}
optim: {lr: 4e-4, betas: [0.9, 2], schedule: {nam: cosine}}
steps: 1
deepspeed: 3
""",
    )
    with pytest.raises(InputError) as caught:
        load(TrainConfig, path, ["seed=-1"])
    lines = caught.value.errors
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in lines)
    errors = {line.removeprefix(f"{path}: ").split(": ")[0]: line for line in lines}
    assert set(errors) == {
        "modell",
        "model.presett",
        "data.train.0.wieght",
        "data.row_length",
        "batch.micro_batch_rows",
        "optim.betas.1",
        "optim.schedule.nam",
        "deepspeed",
        "seed",
    }
    assert "did you mean 'model'?" in errors["modell"]
    assert "did you mean 'preset'?" in errors["model.presett"]
    assert "did you mean 'weight'?" in errors["data.train.0.wieght"]
    assert "did you mean 'name'?" in errors["optim.schedule.nam"]
    assert "greater than or equal to 2, not 1" in errors["data.row_length"]


def test_overrides_are_dotted_paths(tmp_path):
    config = load(TrainConfig, CONFIGS / "train/quickstart.yaml", ["optim.lr=3e-4", "data.row_length=64"])
    assert config.optim.lr == 3e-4
    assert config.data.row_length == 64


def test_a_run_without_an_end_is_refused(tmp_path):
    mapping = yaml.safe_load((CONFIGS / "train/quickstart.yaml").read_text())
    del mapping["steps"]
    with pytest.raises(InputError, match="steps or epochs"):
        load(TrainConfig, written(tmp_path, yaml.safe_dump(mapping)))


@pytest.mark.parametrize("text", ["run_dir: [", "- a\n- b\n", "a: 1\na: 2\n"])
def test_yaml_that_is_not_a_mapping_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(InputError) as caught:
        load(TrainConfig, written(tmp_path, text))
    assert len(caught.value.errors) == 1


def test_a_missing_file_and_a_bad_override_are_reported_together(tmp_path):
    with pytest.raises(InputError) as caught:
        load(TrainConfig, tmp_path / "none.yaml", ["steps"])
    assert len(caught.value.errors) == 2


def test_an_invalid_override_is_named(tmp_path):
    with pytest.raises(InputError) as caught:
        load(TrainConfig, CONFIGS / "train/quickstart.yaml", ["steps=[1", "seed={"])
    assert [line.split(": ")[0] for line in caught.value.errors] == ["'steps=[1'", "'seed={'"]


def test_a_dumped_config_loads_again(tmp_path):
    config = load(TrainConfig, CONFIGS / "train/quickstart.yaml")
    path = written(tmp_path, dump(config, world_size=2))
    assert load(TrainConfig, path) == config
