"""A run may start from another model's weights: exactly those, with a new optimizer and that model's normaliser."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import finish, run_dir, start

from lcm_ds import BaseLCM
from lcm_ds.checkpoint.format import find, load_model
from lcm_ds.convert.base_lcm import read_meta
from lcm_ds.convert.export import export
from lcm_ds.data.format import read_normalizer, write_normalizer
from lcm_ds.errors import InputError
from lcm_ds.model import modeling
from lcm_ds.model.pretrained import write_folder
from lcm_ds.train.job_builder import build_job

GOLDEN = Path(__file__).parents[1] / "fixtures" / "base_lcm_fairseq2.safetensors"
# A step that changes nothing: the export after it has the initial weights.
STILL = {"steps": 1, "optim": {"lr": 1e-12, "weight_decay": 0.0}, "evaluate": {"every": None}, "noise_std": 0.0}


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "model"
    export(run_dir(trained(2)), output)
    return output


@pytest.fixture
def moved_away(synthetic_dataset, tmp_path):
    """Makes datasets of a dimension, each with its own normaliser."""

    def make(embed_dim, seed):
        folder = tmp_path / f"data-{seed}"
        shutil.copytree(synthetic_dataset(documents=40, embed_dim=embed_dim, documents_per_shard=10, seed=seed), folder)
        center, scale = read_normalizer(folder)
        write_normalizer(folder, center + seed, scale * seed, {})
        return str(folder)

    return make


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9) for name in ours
    )


@pytest.mark.parametrize("source", ["folder", pytest.param("run", marks=pytest.mark.slow)])
def test_an_exported_folder_and_a_run_give_their_weights_and_their_normaliser(
    source, exported, trained, make_config, moved_away
):
    # Other data, whose normalisers differ and do not matter; two ranks, of which one reads.
    other = [{"path": moved_away(16, seed)} for seed in (5, 6)]
    path = exported if source == "folder" else run_dir(trained(2))
    zero = "ds_configs/zero3_fp32.json" if source == "folder" else "ds_configs/zero1_fp32.json"
    data = {"train": other, "row_length": 32, "max_segment": 16}
    config = make_config(**STILL, model={"init_from": str(path), "dropout": 0.0}, data=data, deepspeed=zero)
    code, out, err = finish(start("launch", "--local", 2, config))
    assert code == 0, out + err
    assert f"weights from {path}" in out
    assert "its normaliser; new optimizer" in out
    model, _, step = load_model(run_dir(config))
    assert step == 1
    assert same(model, BaseLCM.from_pretrained(exported))
    assert model.config.dropout == 0.0
    assert find(run_dir(config)).state()["init_from"] == str(path)


def test_a_checkpoint_of_metas_takes_the_normaliser_of_the_data(call, make_config, synthetic_dataset, tmp_path):
    data = synthetic_dataset(documents=20, embed_dim=48, documents_per_shard=10, seed=3)
    data = {"train": str(data), "row_length": 32, "max_segment": 16}
    config = make_config(**STILL, model={"init_from": str(GOLDEN)}, data=data)
    code, out, err = finish(start("train", config))
    assert code == 0, out + err
    assert f"weights from {GOLDEN} (Meta's), the normaliser of the training data, as it has none" in out
    code, out, err = call("import-meta", GOLDEN, tmp_path / "imported")
    assert code == 0, out + err
    imported = BaseLCM.from_pretrained(tmp_path / "imported")
    model, _, _ = load_model(run_dir(config))
    for name, weight in imported.named_parameters():
        assert torch.allclose(model.get_parameter(name), weight, rtol=0, atol=1e-9), name
    assert not torch.equal(model.normalizer.center, imported.normalizer.center)


def test_a_mixture_needs_one_normaliser_if_the_model_has_none(make_config, moved_away, tmp_path):
    train = [{"path": moved_away(48, seed)} for seed in (5, 6)]
    write_folder(modeling.BaseLCM(read_meta(GOLDEN, None)[0]).initialize(0), tmp_path / "imported")
    for source in (GOLDEN, tmp_path / "imported"):
        model = {"init_from": str(source)}
        with pytest.raises(InputError) as refused:
            build_job(make_config(model=model, data={"train": train, "row_length": 32}), [], 1)
        (line,) = refused.value.errors
        assert line.endswith(f"lcm-ds fit-normalizer {train[0]['path']} {train[1]['path']}")


@pytest.mark.slow
def test_a_run_resumes_after_its_init_from_was_deleted(exported, make_config, moved_away, tmp_path):
    """Also on more ranks, for which its checkpoint is converted: with its initial normaliser."""
    gone = shutil.copytree(exported, tmp_path / "gone")
    other = [{"path": moved_away(16, seed)} for seed in (5, 6)]
    changes = {"model": {"init_from": str(gone)}, "data": {"train": other, "row_length": 32, "max_segment": 16}}
    config = make_config(**STILL | {"steps": 3, "checkpoint": {"every": 1}, **changes})
    code, out, err = finish(start("train", config, "steps=1"))
    assert code == 0, out + err
    shutil.rmtree(gone)
    for arguments, steps in ((("train",), 2), (("launch", "--local", 2), 3)):
        code, out, err = finish(start(*arguments, config, f"steps={steps}"))
        assert code == 0, out + err
        assert "resumed" in out
        assert "weights from" not in out
        model, _, step = load_model(run_dir(config))
        assert step == steps
        assert same(model, BaseLCM.from_pretrained(exported))


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_init_from(trained, make_config):
    began = run_dir(trained(2))
    config = make_config(run_dir=str(began), model={"init_from": str(began), "dropout": 0.1})
    code, out, err = finish(start("train", config))
    assert code == 2, out + err
    assert f"model.init_from was null and is now {began}; undo that" in err


def test_sizes_other_than_those_of_the_weights_are_reported_at_once(exported, make_config):
    model = {"init_from": str(exported), "hidden_size": 48, "num_hidden_layers": 3, "dropout": 0.3}
    with pytest.raises(InputError) as refused:
        build_job(make_config(model=model), [], 1)
    first, second = sorted(refused.value.errors)
    assert f"model.hidden_size: is 48, and 32 in {exported}" in first
    assert "model.num_hidden_layers: is 3, and 2 in" in second


def test_other_paths_are_refused_by_name(make_config, tmp_path):
    (tmp_path / "config.json").write_text("{")
    for path, expected in ((tmp_path / "nowhere", "neither a run"), (tmp_path, "config.json cannot be read")):
        with pytest.raises(InputError) as refused:
            build_job(make_config(model={"init_from": str(path)}), [], 1)
        (line,) = refused.value.errors
        assert "model.init_from: " in line
        assert expected in line


def test_a_large_model_is_split_into_files_that_load_as_one(trained, tmp_path):
    config = trained(2)
    code, out, err = finish(start("export", run_dir(config), tmp_path / "cut", "--max-shard-size", "10KB"))
    assert code == 0, out + err
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "cut" / "model.safetensors.index.json").is_file()
    assert same(BaseLCM.from_pretrained(tmp_path / "cut"), load_model(run_dir(config))[0])


def test_the_description_of_the_concepts_is_exported(exported, concepts):
    info = json.loads((exported / "concepts.json").read_text())
    dataset = json.loads((Path(concepts["train"]) / "dataset.json").read_text())
    assert info["encoder"] == dataset["encoder"]
    assert info["end_of_text"] == dataset["end_of_text"]
    assert info["max_segment"] == 16
    assert info["source_suffix"] is None


def test_half_precision_halves_the_weights_and_leaves_the_normaliser(trained, tmp_path):
    config = trained(2)
    export(run_dir(config), tmp_path / "half", dtype="bfloat16")
    half, full = BaseLCM.from_pretrained(tmp_path / "half"), load_model(run_dir(config))[0]
    assert half.post_net.weight.dtype == torch.bfloat16
    assert torch.equal(half.post_net.weight, full.post_net.weight.bfloat16())
    assert torch.equal(half.normalizer.center, full.normalizer.center)


def test_errors_of_an_export_are_reported_together(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(InputError) as refused:
        export(tmp_path / "none", tmp_path / "there", max_shard_size="much")
    size, folder, run = refused.value.errors
    assert "--max-shard-size much" in size
    assert "is there already" in folder
    assert "none: no run here" in run
