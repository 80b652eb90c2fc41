"""What a model to generate with is loaded from: a run, or an exported Hugging Face folder; and what made its concepts.

A run's training datasets say the latter; an exported folder's concepts.json, or a dataset that the user names.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lcm_ds.config import DataConfig, TrainConfig, load
from lcm_ds.data.concepts import CONCEPTS, ConceptInfo
from lcm_ds.data.format import DATASET, Dataset, open_dataset, open_for_run, read_info
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import read_object
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.pretrained import read_folder


@dataclass(frozen=True)
class Origin:
    """A model's place, read as far as that costs nothing: it is there, and so is what says how to talk to it."""

    path: str
    step: int | None  # of a run's checkpoint; None: an exported folder
    embed_dim: int
    info: ConceptInfo
    says_so: str  # the file that `info` is from
    places: list[str]  # of the datasets to retrieve sentences from
    data: DataConfig | None = None  # of a run: how it reads datasets

    def load(self) -> BaseLCM:
        """The model, in evaluation mode on the CPU, fp32. Raises InputError where the weights cannot be read."""
        if self.step is not None:
            from lcm_ds.checkpoint.format import load_model

            return load_model(self.path, self.step)[0]
        return read_folder(self.path)

    def open_datasets(self) -> list[Dataset]:
        """The datasets to retrieve sentences from. Raises InputError where one is not there or has other concepts."""
        errors, opened = Collector(), []
        for place in self.places:
            with errors:
                opened.append(open_dataset(place) if self.data is None else open_for_run(place, self.data))
        for dataset in opened:
            with errors:
                self._check(dataset)
        errors.raise_if_any()
        return opened

    def _check(self, dataset: Dataset) -> None:
        if dataset.embed_dim != self.embed_dim:
            raise InputError(
                f"--dataset: {dataset.path} has concepts of {dataset.embed_dim} numbers, the model of {self.embed_dim}"
            )
        its, ours = (f"{of.get('name')} {of.get('model')}" for of in (dataset.info.encoder, self.info.encoder))
        if its != ours:
            raise InputError(f"--dataset: {dataset.path} is of the encoder {its}, the model of {ours} ({self.says_so})")


def find_origin(path: str | Path, step: int | None = None, dataset: str | None = None) -> Origin:
    """The run or exported folder at `path`.

    step: of a run's checkpoint; default: the newest. dataset: to retrieve from, instead of a run's training datasets;
    it also says how to talk to a model where nothing else does. Raises InputError with every mistake.
    """
    folder = Path(path)
    if (folder / "config.yaml").is_file():
        return _of_run(folder, step, dataset)
    if (folder / "config.json").is_file():
        return _of_folder(folder, step, dataset)
    raise InputError(f"{path}: no run here (config.yaml is missing) and no exported model (config.json is missing)")


def _of_run(run: Path, step: int | None, named: str | None) -> Origin:
    from lcm_ds.checkpoint.format import find

    errors = Collector()
    config = load(TrainConfig, run / "config.yaml")
    path = config.data.train[0].path
    with errors:
        checkpoint = find(run, step)
    with errors:
        try:
            info = read_info(path)
        except InputError as error:
            if named is None:
                hint = ": --dataset has to name one that the model's encoder made"
                raise InputError(f"{mistake}{hint}" for mistake in error.errors) from None
            path, info = named, read_info(named)
    errors.raise_if_any()
    mixed = []
    for other in config.data.train[1:]:
        with suppress(InputError):  # one that is not at hand any more
            mixed.append(read_info(other.path))
    return Origin(
        str(run),
        checkpoint.step,
        checkpoint.state()["model"]["embed_dim"],
        ConceptInfo.of(info, config.data.max_segment, mixed),
        f"{path}/{DATASET}",
        [named] if named else [source.path for source in config.data.train],
        config.data,
    )


def _of_folder(folder: Path, step: int | None, named: str | None) -> Origin:
    errors = Collector()
    if step is not None:
        errors.errors.append(f"--step {step}: {folder} is an exported model, which has one step only")
    info, says_so = None, folder / CONCEPTS
    with errors:
        sizes = read_object(folder / "config.json")
    with errors:
        info = ConceptInfo.read(folder)
        if info is None and named is not None:
            info, says_so = ConceptInfo.of(read_info(named)), Path(named, DATASET)
        elif info is None:
            raise InputError(
                f"{folder}: {CONCEPTS} is missing, which says what encoder made the model's concepts: "
                "--dataset has to name a dataset of that encoder"
            )
    errors.raise_if_any()
    assert info is not None
    embed_dim = sizes.get("embed_dim", BaseLCMConfig.embed_dim)
    return Origin(str(folder), None, embed_dim, info, str(says_so), [] if named is None else [named])
