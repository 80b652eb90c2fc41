"""Everything that can be wrong with a run before it starts, found in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_ds import ds_config
from lcm_ds.config import TrainConfig, read_yaml, validate
from lcm_ds.data.cache import Cache
from lcm_ds.data.format import Dataset, open_dataset
from lcm_ds.data.plan import Plan, Source, fingerprint
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import why_not_writable
from lcm_ds.model.config import BaseLCMConfig, resolve_model
from lcm_ds.train.initial import Initial, find_initial, sizes_of_run
from lcm_ds.train.trackers import missing_packages


@dataclass(frozen=True)
class Job:
    """A run that has passed its checks."""

    config: TrainConfig
    ds: dict[str, Any]  # the DeepSpeed JSON, every "auto" filled in
    model: BaseLCMConfig
    datasets: list[Dataset]
    validation: Dataset | None
    plan: Plan
    fingerprint: str
    initial: Initial | None = None  # where its first weights are from; None: they are fresh, or its own checkpoint's

    @property
    def run_dir(self) -> Path:
        """Where the run lives."""
        return Path(self.config.run_dir)

    @property
    def total_steps(self) -> int:
        """Steps until the run is done: `steps`, the end of `epochs`, or the sooner of both."""
        ends = [end for end in (self.config.steps, self.plan.steps) if end is not None]
        return min(ends)


def check(path: str | Path, overrides: Sequence[str], world_size: int) -> Job:
    """Read and check a run's config against its datasets, its DeepSpeed JSON and the number of ranks.

    Raises InputError with every mistake of all of them, one line each.
    """
    mapping = read_yaml(path, overrides)
    mistakes = Collector()
    config: TrainConfig | None = None
    with mistakes:
        config = validate(TrainConfig, mapping, path)
    # The parts are looked at even where the config as a whole is wrong, so that nobody has to come back twice.
    ds: dict[str, Any] | None = None
    with mistakes:
        ds = _read_ds(mapping.get("deepspeed"), Path(path))
    data = mapping.get("data") if isinstance(mapping.get("data"), dict) else {}
    assert isinstance(data, dict)
    datasets = [_open(entry, "data.train", data, path, mistakes) for entry in _train_paths(data)]
    validation = _open(data.get("validation"), "data.validation", data, path, mistakes)
    if config is None or ds is None:
        mistakes.raise_if_any()
    assert config is not None
    assert ds is not None
    model: BaseLCMConfig | None = None
    initial: Initial | None = None
    with mistakes:
        model, initial = _model(config, path)
    resolved: dict[str, Any] = {}
    with mistakes:
        width = None if model is None else model.hidden_size
        resolved = ds_config.resolve(ds, config, world_size, _ds_origin(config, path), path, width)
    if wrong := why_not_writable(config.run_dir):
        mistakes.mistakes.append(f"{path}: run_dir: {wrong}")
    opened = [dataset for dataset in [*datasets, validation] if dataset is not None]
    mistakes.mistakes.extend(_disagreements(opened, model, path))
    mistakes.raise_if_any()
    assert model is not None
    plan, mark = plan_of(config, [dataset for dataset in datasets if dataset is not None])
    job = Job(config, resolved, model, [d for d in datasets if d is not None], validation, plan, mark, initial)
    if lines := _step_mistakes(job, path):
        raise InputError(lines)
    return job


def _model(config: TrainConfig, path: str | Path) -> tuple[BaseLCMConfig, Initial | None]:
    """The model, and what its first weights are from. A run that has begun no longer needs that."""
    if config.model.init_from is None:
        return resolve_model(config.model, str(path)), None
    own = sizes_of_run(Path(config.run_dir))
    if own is not None:
        return resolve_model(config.model, str(path), own), None
    try:
        initial = find_initial(config.model)
    except InputError as error:
        raise type(error)(f"{path}: model.init_from: {line}" for line in error.mistakes) from None
    return resolve_model(config.model, str(path), initial.config), initial


def plan_of(config: TrainConfig, datasets: Sequence[Dataset]) -> tuple[Plan, str]:
    """The order in which a run reads its datasets, and the fingerprint of that order."""
    weights = [entry.weight for entry in config.data.train]
    rows, length = config.batch.rows_per_step, config.data.row_length
    sources = [
        Source([shard.concepts for shard in dataset.shards], weight)
        for dataset, weight in zip(datasets, weights, strict=True)
    ]
    mark = fingerprint(
        [dataset.fingerprint for dataset in datasets], weights, config.seed, rows, length, config.data.max_segment
    )
    return Plan(sources, config.seed, rows, length, config.epochs), mark


def _step_mistakes(job: Job, path: str | Path) -> list[str]:
    """Settings of `train` and `log` that would do nothing."""
    train, lines = job.config.train, []
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
    return ds_config.read(value, path) if isinstance(value, str | dict) else None


def _ds_origin(config: TrainConfig, path: str | Path) -> str:
    return config.deepspeed if isinstance(config.deepspeed, str) else f"{path}: deepspeed"


def _train_paths(data: dict[str, Any]) -> list[Any]:
    train = data.get("train")
    if isinstance(train, list):
        return [entry.get("path") for entry in train if isinstance(entry, dict)]
    return [train]


def _open(value: Any, key: str, data: dict[str, Any], path: str | Path, mistakes: Collector) -> Dataset | None:
    if not isinstance(value, str):
        return None
    cache_dir, cache_gb = data.get("cache_dir"), data.get("cache_gb")
    limit = cache_gb if isinstance(cache_gb, int | float) else None
    cache = Cache.of(cache_dir, limit) if isinstance(cache_dir, str) else None
    checksums, skip_bad = data.get("verify") != "size", data.get("on_bad_shard") == "skip"
    with mistakes:
        try:
            return open_dataset(value, cache, checksums, skip_bad=skip_bad)
        except InputError as error:
            raise type(error)(f"{path}: {key}: {line}" for line in error.mistakes) from None
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
    return lines
