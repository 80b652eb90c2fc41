"""Small datasets of real sentences, made by `prepare` with real encoders, and a run whose model is untrained."""

import json

import pytest
import torch

from lcm_ds.config import PrepareConfig, TrainConfig, dump, validate
from lcm_ds.data.format import open_dataset, read_normalizer
from lcm_ds.files import sha256_of
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.pretrained import write_folder
from lcm_ds.prepare.pipeline import prepare

TEXTS = {
    "rain": "Rain falls on the hills. The river rises in the night. By morning the fields are under water. "
    "Farmers move their cows to the barn. The bridge is closed. Children watch from the windows. "
    "In the afternoon the sun comes back. The water goes down slowly. Mud covers the road.",
    "bread": "Bread needs flour, water, salt and yeast. Knead the dough for ten minutes. Let it rest for an hour. "
    "It grows to twice its size. Heat the oven well. Shape a loaf. Bake it until the crust is dark. "
    "Let it cool before you cut it. Fresh bread smells wonderful.",
    "python": "A list holds objects in order. Lists are mutable. Append adds an object at the end. "
    "A tuple cannot be changed. Dictionaries map keys to values. Keys have to be hashable. "
    "A set holds each object once. Loops go over all of them. Functions return values.",
}


def prepared(folder, encoder):
    """The finished training dataset of TEXTS."""
    texts = folder / "texts"
    texts.mkdir()
    for name, text in TEXTS.items():
        (texts / f"{name}.txt").write_text(text)
    config = {
        "output": str(folder / "dataset"),
        "source": {"name": "files", "paths": [str(texts / "*.txt")]},
        "sentences": {"max_characters": 120},
        "encoder": encoder,
        "documents_per_shard": 2,
        "validation": 0.0,
    }
    prepare(validate(PrepareConfig, config, "test"))
    return open_dataset(folder / "dataset" / "train")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """TEXTS by MiniLM, in two shards."""
    encoder = {"name": "sentence-transformers", "model": "minilm", "dtype": "float32", "device": "cpu"}
    return prepared(tmp_path_factory.mktemp("minilm"), encoder)


@pytest.fixture(scope="session")
def tiny_sonar(tmp_path_factory):
    """Folders of an encoder and a decoder with random weights and a real tokenizer."""
    from tiny_sonar import save_tiny_sonar

    return save_tiny_sonar(tmp_path_factory.mktemp("sonar"))


@pytest.fixture(scope="session")
def sonar_dataset(tiny_sonar, tmp_path_factory):
    """TEXTS by a tiny SONAR with random weights."""
    encoder = {"name": "sonar", "model": str(tiny_sonar[0]), "dtype": "float32", "device": "cpu"}
    return prepared(tmp_path_factory.mktemp("sonar-dataset"), encoder)


@pytest.fixture(scope="session")
def make_model():
    """An untrained model for a dataset."""

    def make(dataset):
        config = BaseLCMConfig(
            embed_dim=dataset.embed_dim,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            initializer_range=0.3,
        )
        model = BaseLCM(config).initialize(3)
        model.normalizer.set(*read_normalizer(dataset.path))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def run_folder(dataset, make_model, tmp_path_factory):
    """A run with one checkpoint, as ZeRO stage 0 would leave it, of an untrained model."""
    model = make_model(dataset)
    run = tmp_path_factory.mktemp("run")
    checkpoint = run / "checkpoints" / "step_00000005"
    checkpoint.mkdir(parents=True)
    torch.save({"module": model.state_dict()}, checkpoint / "mp_rank_00_model_states.pt")
    state = {"step": 5, "concepts": 100, "model": model.config.sizes(), "zero_stage": 0}
    (checkpoint / "state.json").write_text(json.dumps(state))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in checkpoint.iterdir()}
    (checkpoint / "COMPLETE").write_text(json.dumps({"files": files}))
    config = {
        "run_dir": str(run),
        "model": {"preset": "quickstart"},
        "data": {"train": dataset.path, "max_segment": 8},
        "batch": {"rows_per_step": 1, "micro_batch_rows": 1},
        "optim": {"lr": 0.001},
        "steps": 5,
        "deepspeed": {},
    }
    (run / "config.yaml").write_text(dump(validate(TrainConfig, config, "test")))
    return run


@pytest.fixture(scope="session")
def exported(dataset, sonar_dataset, tiny_sonar, make_model, tmp_path_factory):
    """Makes exported folders of untrained models: exported("minilm" | "sonar", …) -> the folder.

    constant: the model always predicts the same. decoder, model: of the encoder's block, None leaves one out. The rest
    are entries of concepts.json. exported.datasets: what the models' concepts are from.
    """

    def make(of, constant=False, decoder="its own", model=None, **entries):
        made = make_model(make.datasets[of])
        if constant:
            torch.nn.init.zeros_(made.post_net.weight)
        folder = tmp_path_factory.mktemp("exported")
        write_folder(made, folder)
        info = make.datasets[of].info.model_dump()
        encoder = dict(info["encoder"], **({} if model is None else {"model": model}))
        if of == "sonar" and decoder is not None:
            encoder["decoder"] = str(tiny_sonar[1]) if decoder == "its own" else decoder
        concepts = {key: info[key] for key in ("splitter", "language", "end_of_text")}
        concepts.update({"encoder": encoder, "source_suffix": None, "max_segment": 8, **entries})
        (folder / "concepts.json").write_text(json.dumps(concepts))
        return folder

    make.datasets = {"minilm": dataset, "sonar": sonar_dataset}
    return make
