"""What is evaluated: a run's checkpoint, or an exported Hugging Face folder; and on which data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_ds.checkpoint.format import find, load_model
from lcm_ds.config import DataConfig, TrainConfig, WeightedPath, load
from lcm_ds.data.concepts import ConceptInfo
from lcm_ds.data.format import Dataset, open_for_run
from lcm_ds.data.supervised import missing_targets
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import read_object, sha256_of
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.pretrained import read_folder

SEGMENTS = 8  # longest segments in a row, where no run says how long one is


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, and what it was trained on."""

    path: Path
    step: int | None  # of a run's checkpoint
    weights: str  # a checksum
    embed_dim: int
    encoder: dict[str, Any] | None  # that made the concepts, where the folder says it
    data: DataConfig  # how datasets are opened and rows are cut
    training: list[WeightedPath]  # none where it is not known
    validation: str  # the dataset to evaluate on
    load: Callable[[], BaseLCM]  # fp32, on the CPU

    def open(self) -> tuple[list[Dataset], Dataset]:
        """The training datasets and the one to evaluate on.

        Raises InputError with every mistake: one that cannot be opened, has concepts of another size than the model's,
        or of another encoder; one to evaluate on without targets.
        """
        errors = Collector()
        opened: list[Dataset] = []
        for place in (*(source.path for source in self.training), self.validation):
            with errors:
                opened.append(open_for_run(place, self.data))
        errors.raise_if_any()
        *training, validation = opened
        for each in opened:
            if each.embed_dim != self.embed_dim:
                errors.errors.append(f"{each.path}: embed_dim {each.embed_dim}, the model has {self.embed_dim}")
        encoder = training[0].info.encoder if training else self.encoder
        if encoder is not None and validation.info.encoder != encoder:
            errors.errors.append(
                f"{validation.path}: encoded with {validation.info.encoder}, the model is trained on {encoder}"
            )
        with errors:
            if wrong := missing_targets(validation, self.data.row_length, self.data.max_segment):
                raise InputError(wrong)
        errors.raise_if_any()
        return training, validation


def find_subject(path: str | Path, dataset: str | None = None, step: int | None = None) -> Subject:
    """The run at `path`, its checkpoint of `step` or its newest, or the exported folder there.

    dataset: instead of the run's validation dataset. Raises InputError with every mistake.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file() and (folder / "config.json").is_file():
        return _exported(folder, dataset, step)
    checkpoint = find(folder, step)
    config = load(TrainConfig, folder / "config.yaml")
    validation = dataset or config.data.validation
    if validation is None:
        raise InputError(f"{folder}: the run has no data.validation; name a dataset with --dataset")
    return Subject(
        folder,
        checkpoint.step,
        sha256_of(checkpoint.path / "COMPLETE"),
        checkpoint.state()["model"]["embed_dim"],
        None,
        config.data,
        config.data.train,
        validation,
        lambda: load_model(folder, checkpoint.step)[0],
    )


def _exported(folder: Path, dataset: str | None, step: int | None) -> Subject:
    """An exported folder; concepts.json, where it has one, says what it was trained on."""
    errors = Collector()
    if step is not None:
        errors.errors.append(f"--step {step}: {folder} is an exported model, which has one step only")
    if dataset is None:
        errors.errors.append(f"{folder}: an exported model has no data; name a dataset with --dataset")
    sizes: dict[str, Any] = {}
    info: ConceptInfo | None = None
    with errors:
        sizes = read_object(folder / "config.json")
    with errors:
        info = ConceptInfo.read(folder)
    errors.raise_if_any()
    assert dataset is not None
    longest = DataConfig.model_fields["max_segment"].default if info is None else info.max_segment
    return Subject(
        folder,
        None,
        " ".join(sha256_of(weights) for weights in sorted(folder.glob("*.safetensors"))),
        sizes.get("embed_dim", BaseLCMConfig.embed_dim),
        None if info is None else info.encoder,
        DataConfig.model_validate({"train": dataset, "row_length": SEGMENTS * longest, "max_segment": longest}),
        [],
        dataset,
        lambda: read_folder(folder),
    )
