"""What an evaluation reads: the datasets of a model, opened and checked against it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lcm_ds.checkpoint.model_source import ModelSource
from lcm_ds.config import DataConfig, WeightedPath
from lcm_ds.data.concepts import encoder_differences, same_space
from lcm_ds.data.format import Dataset
from lcm_ds.data.remote import fetch as remote
from lcm_ds.data.supervised import missing_targets
from lcm_ds.errors import Collector, InputError


@dataclass(frozen=True)
class EvaluationTask:
    """The data of an evaluation."""

    data: DataConfig  # how rows are cut
    weights: list[WeightedPath]  # of the training datasets
    training: list[Dataset]  # for the baselines; empty if unknown
    validation: Dataset
    validation_path: str  # as the user or the run names it
    notes: tuple[str, ...] = ()  # in what its encoder differs from the model's, in the same space
    missing: list[str] = field(default_factory=list)  # training datasets that are not on this machine


def open_task(source: ModelSource, dataset: str | None) -> EvaluationTask:
    """Open the training datasets of a model and the one to evaluate it on.

    Args:
        source: the model.
        dataset: to evaluate on; default: the run's validation dataset. The training data may be missing then.

    Raises:
        InputError: with every mistake: no dataset to evaluate on, one that cannot be opened, has concepts of another
            size or encoder than the model's, is a single document or has no targets.
    """
    path = dataset or source.data.validation
    if path is None and source.run is None:
        raise InputError(f"{source.path}: an exported model has no data; name a dataset with --dataset")
    if path is None:
        raise InputError(f"{source.path}: the run has no data.validation; name a dataset with --dataset")
    paths = [each.path for each in source.training]
    missing = [each for each in paths if not remote.is_remote(each) and not Path(each).exists()]
    if missing and dataset is None:
        hint = "with --dataset it is evaluated without the baselines that need the training data"
        raise InputError(f"{each}: the run's training data is not here; {hint}" for each in missing)
    *training, validation = source.open_datasets([*([] if missing else paths), path])
    errors = Collector()
    for each in (*training, validation):
        with errors:
            source.check_embed_dim(each)
    encoder = training[0].info.encoder if training else None if source.info is None else source.info.encoder
    notes: tuple[str, ...] = ()
    if encoder is not None and same_space(encoder, validation.info.encoder):
        if difference := encoder_differences(encoder, validation.info.encoder):
            notes = (f"the encoder of the training data and that of {validation.path} have {difference}",)
    elif encoder is not None:
        errors.errors.append(
            f"{validation.path}: encoded with {validation.info.encoder}, the model was trained on {encoder}"
        )
    if validation.info.totals.documents == 1:
        errors.errors.append(
            f"{validation.path}: is a single document, and intervals need at least two: "
            "prepare more text, or a larger share for validation"
        )
    with errors:
        if problem := missing_targets(validation, source.data.row_length, source.data.max_segment):
            raise InputError(problem)
    errors.raise_if_any()
    weights = [] if missing else source.training
    return EvaluationTask(source.data, weights, training, validation, path, notes, missing)
