"""The evaluation of a run or an exported folder: baselines of its training data, metrics, errors."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from lcm_ds import BaseLCM
from lcm_ds.checkpoint import model_source
from lcm_ds.checkpoint.format import load_run_config
from lcm_ds.config import DataConfig
from lcm_ds.convert.export import export
from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.shard import open_shard
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.errors import InputError
from lcm_ds.evaluate import baselines
from lcm_ds.evaluate import run as evaluation
from lcm_ds.evaluate.compute import measure
from lcm_ds.evaluate.report import print_tables
from lcm_ds.evaluate.run import evaluate
from lcm_ds.evaluate.task import EvaluationTask
from lcm_ds.evaluate.text_metrics import TextMetrics
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.train.trace import trace

EMBED_DIM = 8
ENCODER = {"name": "synthetic", "model": "islands", "revision": None}


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory):
    """A finished dataset of documents of `length` concepts around `middle`, in a space that is normalised as it is."""

    def make(middle, documents=20, length=6, encoder=ENCODER, embed_dim=EMBED_DIM):
        folder = tmp_path_factory.mktemp("dataset")
        random = np.random.default_rng(abs(hash((middle, documents, length))))
        made = [
            Document(f"{n:04d}", f"text-{n}", "synthetic", ["A sentence."] * length, middle + concepts)
            for n, concepts in enumerate(random.normal(size=(documents, length, embed_dim)).astype(np.float32))
        ]
        commit(folder, write_shard(folder, "0.tar", made, "float32"))
        write_normalizer(folder, np.zeros(embed_dim), np.ones(embed_dim), {})
        finish(folder, DatasetInfo(encoder=encoder, embed_dim=embed_dim, dtype="float32"))
        return folder

    return make


@pytest.fixture(scope="session")
def run(make_dataset, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    mapping = {
        "run_dir": str(folder / "run"),
        "model": {"preset": "quickstart", "embed_dim": EMBED_DIM, "hidden_size": 16, "intermediate_size": 32,
                  "num_hidden_layers": 1, "num_attention_heads": 2},
        "data": {"train": str(make_dataset(0.0)), "validation": str(make_dataset(0.5)), "row_length": 16,
                 "max_segment": 8},
        "batch": {"rows_per_step": 2, "micro_batch_rows": 2},
        "optim": {"lr": 1e-3},
        "steps": 2,
        "deepspeed": "ds_configs/zero1_fp32.json",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(mapping))
    command = [sys.executable, "-m", "lcm_ds.cli", "train", str(folder / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def measured(train, validation, row_length=16, **limits):
    """The result of `measure` for an untrained model."""
    data = DataConfig(train=train, row_length=row_length, max_segment=8)
    config = BaseLCMConfig(embed_dim=EMBED_DIM, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2)  # fmt: skip
    model = BaseLCM(config).eval()
    training = [open_dataset(source.path) for source in data.train]
    task = EvaluationTask(data, data.train, training, open_dataset(validation), str(validation))
    return measure(model, task, Ranks(), TextMetrics(None, None, None, ()), 8, **limits)


def squared_distance_of_the_mean_concept(figures):
    return figures["scores"]["mean concept"]["normalised"]["mse"]


def test_baselines_are_fitted_on_all_datasets_of_a_mixture(make_dataset):
    low, high, validation = make_dataset(-3.0), make_dataset(3.0), make_dataset(3.0, documents=30)
    separate = measured(str(low), validation)
    both = measured([{"path": str(low)}, {"path": str(high)}], validation)
    # A target's variance is 1 in each dimension; the mean concept lies 6 away from the validation's, then 3.
    assert squared_distance_of_the_mean_concept(separate) == pytest.approx(1 + 6**2, rel=0.05)
    assert squared_distance_of_the_mean_concept(both) == pytest.approx(1 + 3**2, rel=0.05)
    assert both["baselines"]["fitted_on"] == pytest.approx(2 * separate["baselines"]["fitted_on"], rel=0.1)


def test_each_dataset_of_a_mixture_gets_the_share_of_its_weight(make_dataset, monkeypatch):
    low, high, validation = make_dataset(-3.0), make_dataset(3.0), make_dataset(3.0, documents=30)
    monkeypatch.setattr(baselines, "NEIGHBOUR_CONCEPTS", 4 * 12)
    mixture = [{"path": str(low), "weight": 1}, {"path": str(high), "weight": 3}]
    # 8 rows: 2 of one dataset, 6 of the other.
    figures = measured(mixture, validation, row_length=12, baseline_concepts=8 * 12)
    # Rows of 12 hold two complete documents of 6: 10 targets each.
    assert (figures["baselines"]["fitted_on"], figures["baselines"]["neighbours_among"]) == (8 * 10, 4 * 10)
    assert squared_distance_of_the_mean_concept(figures) == pytest.approx(1 + 1.5**2, rel=0.15)


def test_a_single_document_is_refused(run, make_dataset):
    alone = make_dataset(0.5, documents=1)
    with pytest.raises(
        InputError, match=f"{alone}: is a single document, and intervals need at least two: prepare more"
    ):
        evaluate(run, str(alone))


def test_one_target_has_an_error_and_no_figure_that_needs_others(make_dataset, capsys):
    figures = measured(str(make_dataset(0.0)), make_dataset(0.5, documents=1, length=2))
    assert figures["targets"] == 1
    for by in figures["scores"].values():
        for space in ("normalised", "raw"):
            assert by[space]["ca"] is None
            assert by[space]["variance_ratio"] is None
            assert by[space]["mse"] > 0
        assert by["normalised"]["effective_rank"] is None
        assert by["raw"]["mrr"] > 0  # the candidates are the document's two concepts
    # One document cannot be drawn again and again.
    assert all(ends is None for by in figures["intervals"].values() for space in by.values() for ends in space.values())
    assert figures["difference"]["interval"] is None
    print_tables("a model", {**figures, "dataset": "it"})
    printed = capsys.readouterr().out
    assert "MSE ↓" in printed
    assert "CA % ↑" not in printed  # empty for all
    assert "MI ↑" not in printed
    assert " than the best baseline" in printed


def test_a_dataset_without_targets_is_refused(run, make_dataset):
    lonely = make_dataset(0.5, documents=3, length=1)
    with pytest.raises(InputError, match="holds nothing to predict") as caught:
        evaluate(run, str(lonely))
    assert str(lonely) in caught.value.errors[0]


def test_all_errors_are_reported_before_the_model_is_loaded(run, make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(model_source, "load_model", lambda *_: pytest.fail("the model was loaded"))
    other = make_dataset(0.5, encoder={**ENCODER, "revision": "b"}, embed_dim=4)
    with pytest.raises(InputError) as caught:
        evaluate(run, str(other), str(tmp_path / "nowhere/figures.json"), figure=str(tmp_path), samples=0)
    json_file, figure, samples, dims, encoder = caught.value.errors
    assert "--json" in json_file
    assert "--figure" in figure
    assert "--samples: 0" in samples
    assert "embed_dim 4, the model has 8" in dims
    assert "'revision': 'b'" in encoder


def test_an_evaluation_on_disk_is_printed_again(run, capsys, monkeypatch):
    first = evaluate(run)
    assert json.loads((run / "evaluation.json").read_text()) == first
    assert f"All metrics: {run / 'evaluation.json'}" in capsys.readouterr().out
    monkeypatch.setattr(model_source, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert evaluate(run) == first
    # The same dataset by its name is the same question.
    assert evaluate(run, first["dataset"]) == first
    assert capsys.readouterr().out.count("already evaluated at step 2") == 2
    monkeypatch.undo()
    # What the figures depend on is another: so are they.
    other = evaluate(run, samples=7)
    assert (first["samples"], other["samples"]) == (256, 7)
    assert json.loads((run / "evaluation.json").read_text()) == other


def test_a_missing_decoder_is_looked_for_again(run, monkeypatch, capsys):
    """A decoder whose hub was down, and is up again."""
    looked = []

    def away(*_):
        looked.append("away")
        return TextMetrics(None, None, None, ("ℓ2-r, MI: no decoder: the hub is away",))

    monkeypatch.setattr(evaluation, "load_text_metrics", away)
    first = evaluate(run, samples=5)
    looked.clear()
    assert evaluate(run, samples=5) == first
    assert looked == ["away"]
    assert "already evaluated" in capsys.readouterr().out

    class Decoder:
        def decode(self, concepts):
            return [f"{concept[0]:.1f}" for concept in concepts]

    class Encoder:
        def encode(self, sentences):
            return np.array([[float(sentence)] * EMBED_DIM for sentence in sentences], np.float32)

    monkeypatch.setattr(evaluation, "load_text_metrics", lambda *_: TextMetrics(Encoder(), Decoder(), None, ()))
    second = evaluate(run, samples=5)
    assert (first["decoded"], second["decoded"]) == (0, 5)
    assert second["scores"]["Base-LCM"]["raw"]["l2_round_trip"] > 0
    assert "l2_round_trip" not in first["scores"]["Base-LCM"]["raw"]


@pytest.mark.parametrize("changes", [{"format_version": 2}, {"missing_concepts": 12}])
def test_an_evaluation_of_another_version_or_with_missing_concepts_is_repeated(run, changes, capsys):
    first = evaluate(run)
    (run / "evaluation.json").write_text(json.dumps({**first, **changes}))
    capsys.readouterr()
    again = evaluate(run)
    assert "already evaluated" not in capsys.readouterr().out
    assert {key: value for key, value in again.items() if not key.startswith("seconds")} == {
        key: value for key, value in first.items() if not key.startswith("seconds")
    }


@pytest.mark.parametrize(
    ("value", "interval", "said"),
    [
        (0.2, [0.1, 0.3], "worse than the best baseline"),
        (-0.2, [-0.3, -0.1], "better than the best baseline"),
        (0.2, [-0.1, 0.3], "the data cannot tell it and the best baseline apart"),
        (-0.2, None, "better than the best baseline"),
    ],
)
def test_the_difference_is_said_in_words(run, capsys, value, interval, said):
    found = evaluate(run)
    capsys.readouterr()
    print_tables("a model", {**found, "difference": {**found["difference"], "value": value, "interval": interval}})
    assert f": {said}\n" in capsys.readouterr().out


def test_the_difference_is_to_the_baseline_that_held_out_training_documents_choose(run, capsys):
    found = evaluate(run)
    errors, best = found["baselines"]["held_out_mse"], found["baselines"]["best"]
    assert set(errors) == set(found["scores"]) - {"Base-LCM"}
    assert errors[best] == min(errors.values())
    assert found["difference"]["less"] == best
    assert f"{best} is the best baseline on {found['baselines']['held_out']} targets of held-out training" in (
        capsys.readouterr().out
    )


def test_another_dataset_leaves_the_run_s_own_figures_alone(run, make_dataset, tmp_path, capsys):
    own = evaluate(run)
    capsys.readouterr()
    file = tmp_path / "figures.json"
    figures = evaluate(run, str(make_dataset(2.0)), str(file))
    told = capsys.readouterr().out
    assert figures != own
    assert json.loads(file.read_text()) == figures
    assert json.loads((run / "evaluation.json").read_text()) == own
    assert f"All metrics: {file}" in told
    assert "evaluation.json" not in told


def test_an_exported_folder_is_evaluated_against_the_copy(run, make_dataset, tmp_path, capsys):
    validation = make_dataset(0.5)
    export(run, tmp_path / "model")
    (tmp_path / "model" / "concepts.json").unlink()  # segments of the default length: rows that hold all documents
    with pytest.raises(InputError, match="name a dataset with --dataset"):
        evaluate(tmp_path / "model")
    with pytest.raises(InputError, match="--step 2"):
        evaluate(tmp_path / "model", str(validation), step=2)
    figures = evaluate(tmp_path / "model", str(validation), figure=str(tmp_path / "figure.png"))
    assert list(figures["scores"]) == ["Base-LCM", "copy of the last"]
    assert "the copy is the only baseline" in capsys.readouterr().out
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    # Rows are long enough that no document is cut here.
    shard = open_shard(open_dataset(validation), 0)
    documents = torch.stack([torch.from_numpy(shard.concepts(number)) for number in range(len(shard))])
    model = BaseLCM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        error = (model(documents)[:, :-1] - documents[:, 1:]).square().mean().item()
    assert figures["targets"] == 20 * 5
    assert figures["scores"]["Base-LCM"]["normalised"]["mse"] == pytest.approx(error, rel=1e-5)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}


@pytest.fixture
def project(make_dataset, tmp_path):
    """A folder with datasets and a run that was started in it, all named by relative paths."""
    folder = tmp_path / "project"
    for name, middle in (("train", 0.0), ("validation", 0.5)):
        shutil.copytree(make_dataset(middle), folder / "data" / name)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mapping = {
        "run_dir": "runs/first",
        "model": {"preset": "quickstart", "embed_dim": EMBED_DIM, **sizes},
        "data": {"train": "data/train", "validation": "data/validation", "row_length": 16, "max_segment": 8},
        "batch": {"rows_per_step": 2, "micro_batch_rows": 2},
        "optim": {"lr": 1e-3},
        "steps": 1,
        "deepspeed": "ds_configs/zero1_fp32.json",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(mapping))
    command = [sys.executable, "-m", "lcm_ds.cli", "train", "config.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_run_is_evaluated_and_traced_from_another_folder_and_after_it_was_moved(
    project, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir("/")
    first = evaluate(project / "runs/first")
    assert first["dataset"] == str(project / "data/validation")
    assert len(trace(project / "runs/first", (), 0)) == 1
    moved = tmp_path / "elsewhere"
    project.rename(moved)
    (moved / "runs/first/evaluation.json").unlink()
    again = evaluate(moved / "runs/first")
    assert again["dataset"] == str(moved / "data/validation")
    assert again["scores"] == first["scores"]
    assert len(trace(moved / "runs/first", (), 0)) == 1
    # From a folder with a dataset of this name, that one is meant.
    monkeypatch.chdir(moved)
    assert load_run_config("runs/first").data.validation == "data/validation"


def test_absolute_paths_of_data_that_was_moved_with_its_run_are_found(project, tmp_path):
    config, moved = project / "runs/first/config.yaml", tmp_path / "new"
    for name in ("runs/first", "data/train", "data/validation"):
        config.write_text(config.read_text().replace(f": {name}\n", f": {project / name}\n"))
    other = yaml.safe_load(config.read_text())
    assert other["data"]["validation"] == f"{project}/data/validation"
    assert load_run_config(project / "runs/first").data.validation == f"{project}/data/validation"
    project.rename(moved)
    data = load_run_config(moved / "runs/first").data
    assert [data.validation, *(each.path for each in data.train)] == [f"{moved}/data/validation", f"{moved}/data/train"]
    shutil.rmtree(moved / "data/validation")  # named as the config has it
    assert load_run_config(moved / "runs/first").data.validation == f"{project}/data/validation"


def test_without_the_training_data_a_dataset_is_evaluated_without_the_baselines_that_need_it(
    project, make_dataset, capsys
):
    shutil.rmtree(project / "data/train")
    with pytest.raises(InputError) as caught:
        evaluate(project / "runs/first")
    (line,) = caught.value.errors
    assert line.startswith(f"{project}/data/train: the run's training data is not here")  # seen from where it started
    figures = evaluate(project / "runs/first", str(make_dataset(0.5)))
    assert list(figures["scores"]) == ["Base-LCM", "copy of the last"]
    (note,) = (note for note in figures["notes"] if "not here" in note)
    for name in ("mean concept", "ridge from the last", "nearest in the training data", f"{project}/data/train"):
        assert name in note
    assert "".join(note.split()) in "".join(capsys.readouterr().out.split())  # lines are wrapped
    with pytest.raises(InputError, match="no such dataset folder"):
        evaluate(project / "runs/first", "nowhere")


def test_an_earlier_checkpoint_is_named_by_its_step(run):
    assert evaluate(run, step=2)["step"] == 2
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        evaluate(run, step=7)


def test_two_processes_find_what_one_finds(run, make_dataset, tmp_path):
    other = make_dataset(1.0, documents=40, length=7)
    separate = evaluate(run, str(other))
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "lcm_ds.cli", "evaluate", str(run), "--dataset", str(other), "--json", str(file)]
    done = subprocess.run([*command, "--processes", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    together = json.loads(file.read_text())
    assert (separate["processes"], together["processes"]) == (1, 2)
    for part in ("targets", "baselines", "retrieval", "scores", "truth", "intervals", "difference", "by_position"):
        assert_near(together[part], json.loads(json.dumps(separate[part])))


def assert_near(one, other):
    """The same structure, and the same numbers to rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_near(value, other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for value, expected in zip(one, other, strict=True):
            assert_near(value, expected)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    else:
        assert one == other
