"""Everything that can be wrong with a run before it starts, found in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_ds import deepspeed_config
from lcm_ds.checkpoint.format import candidates
from lcm_ds.config import TrainConfig, read_yaml, validate
from lcm_ds.data.format import NORMALIZER, Dataset, open_dataset, read_normalizer
from lcm_ds.data.plan import Plan, fingerprint
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.supervised import length_limit, missing_targets, source_of, target_reach
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import why_not_writable
from lcm_ds.model.config import BaseLCMConfig, resolve_model
from lcm_ds.train.init_from import InitFrom, resolve_init_from, sizes_of_run
from lcm_ds.train.job import TrainJob
from lcm_ds.train.monitoring.trackers import missing_packages

# Two ends of text differ if their distance is more of their length than this: another device or precision changes the
# concept of the same text a little.
OTHER_END = 0.1


def build_job(path: str | Path, overrides: Sequence[str], world_size: int) -> TrainJob:
    """Read and check a run's config against its datasets, its DeepSpeed JSON and the number of ranks.

    Raises InputError with every mistake of all of them, one line each.
    """
    mapping = read_yaml(path, overrides)
    errors = Collector()
    config: TrainConfig | None = None
    with errors:
        config = validate(TrainConfig, mapping, path)
    # The parts are looked at even where the config as a whole is wrong, so that nobody has to come back twice.
    ds: dict[str, Any] | None = None
    with errors:
        ds = _read_ds(mapping.get("deepspeed"), Path(path))
    data = mapping.get("data") if isinstance(mapping.get("data"), dict) else {}
    assert isinstance(data, dict)
    datasets = [_open(entry, "data.train", data, path, errors) for entry in _train_paths(data)]
    validation = _open(data.get("validation"), "data.validation", data, path, errors)
    if config is None or ds is None:
        errors.raise_if_any()
    assert config is not None
    assert ds is not None
    model: BaseLCMConfig | None = None
    initial: InitFrom | None = None
    with errors:
        model, initial = _model(config, path)
    resolved: dict[str, Any] = {}
    with errors:
        width = None if model is None else model.hidden_size
        resolved = deepspeed_config.resolve(ds, config, world_size, _ds_origin(config, path), path, width)
    if wrong := why_not_writable(config.run_dir):
        errors.errors.append(f"{path}: run_dir: {wrong}")
    training = [dataset for dataset in datasets if dataset is not None]
    opened = training if validation is None else [*training, validation]
    errors.errors.extend(_disagreements(opened, model, path))
    if config.model.init_from is None or (initial is not None and not initial.has_normalizer):
        errors.errors.extend(_normalizer_disagreements(training, validation, config, path))
    for key, some in (("data.train", datasets), ("data.validation", [validation])):
        for dataset in (each for each in some if each is not None):
            with errors:
                if wrong := missing_targets(dataset, config.data.row_length, config.data.max_segment):
                    raise InputError(f"{path}: {key}: {wrong}")
    errors.raise_if_any()
    assert model is not None
    plan, mark = plan_of(config, training)
    job = TrainJob(config, resolved, model, training, validation, plan, mark, initial)
    if lines := _step_mistakes(job, path):
        raise InputError(lines)
    return job


def _model(config: TrainConfig, path: str | Path) -> tuple[BaseLCMConfig, InitFrom | None]:
    """The model, and what its first weights are from. A run that has begun no longer needs that."""
    if config.model.init_from is None:
        return resolve_model(config.model, str(path)), None
    own = sizes_of_run(Path(config.run_dir))
    if own is not None:
        return resolve_model(config.model, str(path), own), None
    try:
        initial = resolve_init_from(config.model)
    except InputError as error:
        raise type(error)(f"{path}: model.init_from: {line}" for line in error.errors) from None
    return resolve_model(config.model, str(path), initial.config), initial


def plan_of(config: TrainConfig, datasets: Sequence[Dataset]) -> tuple[Plan, str]:
    """The order in which a run reads its datasets, and the fingerprint of that order."""
    weights = [entry.weight for entry in config.data.train]
    rows, length, longest = config.batch.rows_per_step, config.data.row_length, config.data.max_segment
    sources = [source_of(dataset, length, longest, weight) for dataset, weight in zip(datasets, weights, strict=True)]
    supervised = any(dataset.info.supervised is not None for dataset in datasets)
    marks = [dataset.fingerprint for dataset in datasets]
    mark = fingerprint(marks, weights, config.seed, rows, length, longest, supervised)
    return Plan(sources, config.seed, rows, length, config.epochs), mark


def reach_lines(job: TrainJob) -> list[str]:
    """A line for each supervised dataset: how many of its targets are reached.

    An unsupervised one loses the first concept of each segment only; how many those are its shards' counts do not tell.
    """
    data, lines = job.config.data, []
    for when, datasets in (("an epoch", job.datasets), ("validation", [job.validation] if job.validation else [])):
        for dataset in datasets:
            if dataset.info.supervised is not None:
                found = target_reach(dataset, data.row_length, data.max_segment)
                lost = found.all - found.reached
                why = f"{lost:,} are lost: documents longer than {length_limit(data.row_length, data.max_segment)}"
                lines.append(
                    f"{dataset.path}: {when} reaches {found.reached:,} of {found.all:,} targets"
                    + (f"; {why}" if lost else "")
                )
    return lines


def _step_mistakes(job: TrainJob, path: str | Path) -> list[str]:
    """Settings of `train` and `log` that would do nothing, and a warm-up that never ends."""
    train, lines = job.config.train, []
    warmup = job.config.optim.schedule.warmup_steps
    if warmup >= job.total_steps and not candidates(job.run_dir):  # a run that has begun may end as it is
        lines.append(
            f"{path}: optim.schedule.warmup_steps: {warmup}: the run has {job.total_steps} steps and would never reach "
            f"optim.lr; the LCM paper's 4 % would be {max(1, job.total_steps // 25)}"
        )
    if train.recompute_every is not None and "activation_checkpointing" not in job.ds:
        lines.append(
            f"{path}: train.recompute_every: {train.recompute_every}: nothing is recomputed without a block "
            f"activation_checkpointing in {_ds_origin(job.config, path)}; {{}} will do"
        )
    if train.profile_steps is not None and train.profile_steps[0] >= job.total_steps:
        lines.append(
            f"{path}: train.profile_steps: {list(train.profile_steps)}: the run has steps 0 to {job.total_steps - 1}"
        )
    return lines + [f"{path}: {line}" for line in missing_packages(job.config.log)]


def _read_ds(value: Any, path: Path) -> dict[str, Any] | None:
    return deepspeed_config.read(value, path) if isinstance(value, str | dict) else None


def _ds_origin(config: TrainConfig, path: str | Path) -> str:
    return config.deepspeed if isinstance(config.deepspeed, str) else f"{path}: deepspeed"


def _train_paths(data: dict[str, Any]) -> list[Any]:
    train = data.get("train")
    if isinstance(train, list):
        return [entry.get("path") for entry in train if isinstance(entry, dict)]
    return [train]


def _open(value: Any, key: str, data: dict[str, Any], path: str | Path, errors: Collector) -> Dataset | None:
    if not isinstance(value, str):
        return None
    cache_dir, cache_gb = data.get("cache_dir"), data.get("cache_gb")
    length_limit = cache_gb if isinstance(cache_gb, int | float) else None
    cache = Cache.of(cache_dir, length_limit) if isinstance(cache_dir, str) else None
    checksums, skip_bad = data.get("verify") != "size", data.get("on_bad_shard") == "skip"
    with errors:
        try:
            return open_dataset(value, cache, checksums, skip_bad=skip_bad)
        except InputError as error:
            raise type(error)(f"{path}: {key}: {line}" for line in error.errors) from None
    return None


def _disagreements(datasets: Sequence[Dataset], model: BaseLCMConfig | None, path: str | Path) -> list[str]:
    """Datasets that do not fit the model, or one another."""
    lines = []
    for dataset in datasets:
        if model is not None and dataset.embed_dim != model.embed_dim:
            lines.append(
                f"{path}: model.embed_dim: the model takes concepts of {model.embed_dim} dimensions, "
                f"{dataset.path} holds {dataset.embed_dim}; choose a preset or model.embed_dim that fits"
            )
    for dataset in datasets[1:]:
        if dataset.embed_dim != datasets[0].embed_dim:
            lines.append(
                f"{path}: data: {dataset.path} holds concepts of {dataset.embed_dim} dimensions, "
                f"{datasets[0].path} of {datasets[0].embed_dim}; a run needs one size"
            )
        if dataset.info.encoder != datasets[0].info.encoder:
            lines.append(
                f"{path}: data: {dataset.path} was encoded with {dataset.info.encoder}, "
                f"{datasets[0].path} with {datasets[0].info.encoder}; a run needs one encoder"
            )
        elif _other_end(dataset, datasets[0]):
            lines.append(
                f"{path}: data: documents of {dataset.path} end with {_end_of_text(dataset)}, "
                f"of {datasets[0].path} with {_end_of_text(datasets[0])}; a run needs one end of text"
            )
    supervised = [(d, d.info.supervised.source_suffix) for d in datasets if d.info.supervised is not None]
    for dataset, suffix in supervised[1:]:
        if suffix != supervised[0][1]:
            lines.append(
                f"{path}: data: sources of {dataset.path} end with {suffix!r}, of {supervised[0][0].path} with "
                f"{supervised[0][1]!r}; a run needs one source_suffix"
            )
    return lines


def _other_end(one: Dataset, other: Dataset) -> bool:
    """Whether documents end otherwise, by text or concept; what dataset.json does not say is another end, too."""
    ends = one.info.end_of_text, other.info.end_of_text
    if ends[0] is None or ends[1] is None:
        return ends[0] is not ends[1]
    if ends[0].text != ends[1].text:
        return True
    a, b = np.array(ends[0].vector), np.array(ends[1].vector)
    return a.shape == b.shape and bool(np.linalg.norm(a - b) > OTHER_END * np.linalg.norm(b))


def _end_of_text(dataset: Dataset) -> str:
    """As a message has it: with the first numbers, for the same text may have another concept."""
    end = dataset.info.end_of_text
    if end is None:
        return "nothing that dataset.json names"
    return f"{end.text!r} ({', '.join(f'{number:.4g}' for number in end.vector[:3])} …)"


def _normalizer_disagreements(
    training: Sequence[Dataset], validation: Dataset | None, config: TrainConfig, path: str | Path
) -> Iterator[str]:
    """Datasets whose normaliser is not, to the bit, the first one's, which is the run's."""
    if not training:
        return
    first = training[0].path
    own = [numbers.tobytes() for numbers in read_normalizer(first)]
    weights = {entry.weight for entry in config.data.train}
    named = " ".join(f"{each.path}={each.weight:g}" if len(weights) > 1 else each.path for each in config.data.train)
    for dataset in training[1:]:
        if [numbers.tobytes() for numbers in read_normalizer(dataset.path)] != own:
            yield (
                f"{path}: data.train: {dataset.path} has another normaliser than {first}; a run needs one: "
                f"lcm-ds fit-normalizer {named}"
            )
    if validation is not None and [numbers.tobytes() for numbers in read_normalizer(validation.path)] != own:
        yield (
            f"{path}: data.validation: {validation.path} has another normaliser than {first}; a run needs one: copy "
            f"{first}/{NORMALIZER} there"
        )
