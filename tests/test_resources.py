"""Shipped files are found from any folder, and the user's files take precedence."""

import os
from pathlib import Path

import pytest

from lcm_ds import deepspeed_config, resources
from lcm_ds.cli import main
from lcm_ds.config import TrainConfig, load
from lcm_ds.errors import InputError
from lcm_ds.launcher.schedulers import resolve_config

ROOT = Path(__file__).parent.parent
QUICKSTART = "configs/train/quickstart.yaml"


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mistakes_of(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return caught.value.errors


def test_a_config_that_does_not_exist_here_is_the_shipped_one_and_so_is_its_json(empty_folder):
    config = load(TrainConfig, QUICKSTART, ["steps=3"])
    assert config.steps == 3
    assert config.deepspeed == "ds_configs/zero2_bf16.json"
    assert deepspeed_config.zero_stage(deepspeed_config.read(config.deepspeed, Path(QUICKSTART))) == 2
    copy = resolve_config(config, Path(QUICKSTART), empty_folder / "run")
    assert deepspeed_config.read(load(TrainConfig, copy).deepspeed, copy)["zero_optimization"]["stage"] == 2


def test_the_users_files_take_precedence(empty_folder):
    main(["configs", QUICKSTART])
    main(["configs", "ds_configs/zero2_bf16.json"])
    own = empty_folder / QUICKSTART
    own.write_text(own.read_text().replace("seed: 1", "seed: 77"))
    json = empty_folder / "ds_configs/zero2_bf16.json"
    json.write_text(json.read_text().replace('"stage": 2', '"stage": 1'))
    config = load(TrainConfig, QUICKSTART)
    assert config.seed == 77
    assert deepspeed_config.zero_stage(deepspeed_config.read(config.deepspeed, own)) == 1


def test_an_unknown_config_suggests_the_closest_match(empty_folder):
    assert mistakes_of(load, TrainConfig, "configs/train/150.yaml") == [
        "configs/train/150.yaml: no such file here or in lcm-ds; did you mean 'configs/train/150m.yaml'?"
    ]
    (line,) = mistakes_of(load, TrainConfig, "/xyz")
    assert line == "/xyz: no such file here or in lcm-ds; `lcm-ds configs` lists the shipped ones"
    (line,) = mistakes_of(load, TrainConfig, empty_folder)
    assert "Is a directory" in line


def test_a_path_that_leaves_the_shipped_folders_finds_nothing(empty_folder):
    assert resources.find("configs/../setup.py") is None
    assert resources.find("setup.py") is None


def test_the_list_has_every_file_with_what_it_is_for(capsys):
    assert main(["configs"]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    shipped = [path for folder in resources.FOLDERS for path in (ROOT / folder).rglob("*.*")]
    assert set(told) == {str(path.relative_to(ROOT)) for path in shipped if path.is_file()}
    assert all(10 <= len(text) < 2 * resources.LONGEST for text in told.values())
    assert told["ds_configs/zero3_nvme.json"] == "ZeRO 3, bf16, optimizer on nvme, parameters on nvme"
    assert told["ds_configs/zero1_muon.json"] == "ZeRO 1, bf16, Muon"
    assert told["configs/train/150m.yaml"].startswith("A 150M-class Base-LCM")


@pytest.mark.parametrize(
    ("call", "becomes"),
    [
        (["launch/slurm.sbatch"], "launch/slurm.sbatch"),
        (["launch/slurm.sbatch", "mine.sbatch"], "mine.sbatch"),
        (["launch/slurm.sbatch", "new/"], "new/slurm.sbatch"),
        (["launch/slurm.sbatch", "there"], "there/slurm.sbatch"),
        (["--all", "new"], "new/launch/slurm.sbatch"),
    ],
)
def test_a_copy_goes_to_its_destination_and_is_executable(empty_folder, call, becomes, capsys):
    (empty_folder / "there").mkdir()
    assert main(["configs", *call]) == 0
    assert f"copied to {becomes}\n" in capsys.readouterr().out
    assert (empty_folder / becomes).read_bytes() == (ROOT / "launch/slurm.sbatch").read_bytes()
    assert os.access(becomes, os.X_OK)


def test_nothing_is_copied_if_a_file_would_be_overwritten(empty_folder, capsys):
    names = (QUICKSTART, "launch/local.sh")
    own = [empty_folder / "new" / name for name in names]
    for path in own:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    assert main(["configs", "--all", "new"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"new/{name}: already exists and is not overwritten" for name in (QUICKSTART, "launch/local.sh")]
    assert sorted(path for path in empty_folder.rglob("*") if path.is_file()) == own
    assert all(path.read_text() == "mine" for path in own)


def test_an_unknown_name_suggests_the_closest_match(empty_folder):
    assert mistakes_of(resources.copy, ["launch/slrum.sbatch"]) == [
        "launch/slrum.sbatch: no such file here or in lcm-ds; did you mean 'launch/slurm.sbatch'?"
    ]
    assert main(["configs", QUICKSTART, "--all", "new"]) == 2
    assert list(empty_folder.iterdir()) == []
