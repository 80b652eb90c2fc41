"""From a train config to a `TrainJob`: everything that can be checked before a run starts, reported at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_ds import deepspeed_config
from lcm_ds.checkpoint.format import candidates
from lcm_ds.config import TrainConfig, read_yaml, validate
from lcm_ds.data.concepts import encoder_differences, same_space
from lcm_ds.data.format import DATASET, NORMALIZER, SPLITS, Dataset, open_dataset, read_normalizer
from lcm_ds.data.index.first_use import indexed
from lcm_ds.data.plan import Plan, fingerprint
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.remote.fetch import is_remote
from lcm_ds.data.supervised import length_limit, missing_targets, source_of, target_reach
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import why_not_writable
from lcm_ds.model.sizes import FP8_MULTIPLE, ModelSizes, Sizes, resolve_sizes
from lcm_ds.train.job import ConfiguredRun, Outline, TrainJob
from lcm_ds.train.monitoring.trackers import missing_packages

if TYPE_CHECKING:
    from lcm_ds.train.init_from import InitFrom

# Relative distance of two end-of-text concepts that count as the same: they vary a little with device and precision.
END_OF_TEXT_TOLERANCE = 0.1


def build_job(path: str | Path, overrides: Sequence[str], world_size: int, sizes: bool = True) -> TrainJob:
    """Read a train config and check it against its datasets, its DeepSpeed JSON and the number of ranks.

    Args:
        path: The YAML file.
        overrides: `key=value` with dotted keys.
        world_size: Number of ranks.
        sizes: Whether the sizes of the datasets' shards are compared: one rank of a run is enough.

    Raises:
        InputError: With every error, one line each.
    """
    mapping = read_yaml(path, overrides)
    errors = Collector()
    config, ds = _read_configs(mapping, path, errors)
    # Datasets are checked even if the config is invalid, to report all errors in one run.
    data = mapping.get("data") if isinstance(mapping.get("data"), dict) else {}
    assert isinstance(data, dict)
    datasets = [_open(entry, "data.train", data, path, sizes, errors) for entry in _train_paths(data)]
    validation = _open(data.get("validation"), "data.validation", data, path, sizes, errors)
    if config is None or ds is None:
        errors.raise_if_any()
    assert config is not None
    assert ds is not None
    model, initial, resolved = _resolve(config, ds, path, world_size, errors)
    training = [dataset for dataset in datasets if dataset is not None]
    errors.errors.extend(_dataset_errors([*training, *([validation] if validation else [])], model, path))
    if config.model.init_from is None or (initial is not None and not initial.has_normalizer):
        errors.errors.extend(_normalizer_errors(training, validation, config, path))
    for key, dataset in [*(("data.train", each) for each in datasets), ("data.validation", validation)]:
        with errors:
            if dataset and (reason := missing_targets(dataset, config.data.row_length, config.data.max_segment)):
                raise InputError(f"{path}: {key}: {reason}")
    errors.raise_if_any()
    assert model is not None
    plan, order = plan_of(config, training)
    job = TrainJob(config, resolved, model, training, validation, plan, order, initial)
    if lines := _step_errors(job, path):
        raise InputError(lines)
    return job


def outline(
    path: str | Path,
    overrides: Sequence[str],
    world_size: int,
    concepts: int | None = None,
    embed_dim: int | None = None,
) -> Outline | None:
    """A run without its data: everything that can be checked and known if it is not there, or is not looked at.

    Args:
        path: The YAML file.
        overrides: `key=value` with dotted keys.
        world_size: Number of ranks.
        concepts: Of an epoch; None: only if a dataset is not there.
        embed_dim: Dimensions of a concept; None: those of the model.

    Returns:
        The run; None if its datasets are there and `concepts` is not given.

    Raises:
        InputError: With every error, one line each.
    """
    mapping = read_yaml(path, overrides)
    errors = Collector()
    config, ds = _read_configs(mapping, path, errors)
    data = mapping.get("data")
    missing = _missing(_train_paths(data) if isinstance(data, dict) else [])
    if concepts is None and not missing:
        return None
    if config is None or ds is None:
        errors.raise_if_any()
    assert config is not None
    assert ds is not None
    model, _, resolved = _resolve(config, ds, path, world_size, errors)
    if model is not None and embed_dim not in (None, model.embed_dim):
        errors.errors.append(
            f"{path}: model.embed_dim: is {model.embed_dim}, but --embed-dim is {embed_dim}; "
            f"set model.embed_dim={embed_dim}"
        )
    errors.raise_if_any()
    assert model is not None
    run = Outline(config, resolved, model, missing, concepts)
    if lines := _step_errors(run, path):
        raise InputError(lines)
    return run


def _missing(paths: Iterable[Any]) -> tuple[str, ...]:
    """The local folders that are not there or hold no finished dataset."""
    return tuple(
        path
        for path in paths
        if isinstance(path, str) and not is_remote(path) and not Path(path).is_file() and not _datasets_in(path)
    )


def _datasets_in(folder: str) -> list[str]:
    """The datasets in a folder: itself, or its splits."""
    return [path for path in (folder, *(f"{folder}/{split}" for split in SPLITS)) if Path(path, DATASET).is_file()]


def _read_configs(
    mapping: dict[str, Any], path: str | Path, errors: Collector
) -> tuple[TrainConfig | None, dict[str, Any] | None]:
    """The YAML and the DeepSpeed JSON that it names; None for one with errors."""
    config: TrainConfig | None = None
    with errors:
        config = validate(TrainConfig, mapping, path)
    ds: dict[str, Any] | None = None
    with errors:
        ds = _read_ds(mapping.get("deepspeed"), Path(path))
    return config, ds


def _resolve(
    config: TrainConfig, ds: dict[str, Any], path: str | Path, world_size: int, errors: Collector
) -> tuple[ModelSizes | None, InitFrom | None, dict[str, Any]]:
    """The model, the origin of its initial weights, and the resolved DeepSpeed JSON."""
    model: ModelSizes | None = None
    initial: InitFrom | None = None
    with errors:
        model, initial = _model(config, path)
    resolved: dict[str, Any] = {}
    with errors:
        hidden_size = None if model is None else model.hidden_size
        resolved = deepspeed_config.resolve(ds, config, world_size, _ds_origin(config, path), path, hidden_size)
    if reason := why_not_writable(config.run_dir):
        errors.errors.append(f"{path}: run_dir: {reason}")
    return model, initial, resolved


def _model(config: TrainConfig, path: str | Path) -> tuple[ModelSizes, InitFrom | None]:
    """The model, and the origin of its initial weights, which a run with a checkpoint no longer needs."""
    if config.model.init_from is None:
        return resolve_sizes(config.model, str(path)), None
    own = _sizes_of_run(Path(config.run_dir))
    if own is not None:
        return resolve_sizes(config.model, str(path), own), None
    from lcm_ds.train.init_from import resolve_init_from

    try:
        initial = resolve_init_from(config.model)
    except InputError as error:
        raise type(error)(f"{path}: model.init_from: {line}" for line in error.errors) from None
    return resolve_sizes(config.model, str(path), initial.config), initial


def _sizes_of_run(run_dir: Path) -> ModelSizes | None:
    """The model of a run's own newest checkpoint, from which it resumes; None if it has none yet."""
    for checkpoint in reversed(candidates(run_dir)):
        if checkpoint.integrity_error() is None:
            return ModelSizes(**checkpoint.state()["model"])
    return None


def plan_of(config: TrainConfig, datasets: Sequence[Dataset]) -> tuple[Plan, str]:
    """The order in which a run reads its datasets, and the fingerprint of that order."""
    weights = [entry.weight for entry in config.data.train]
    rows, length, max_segment = config.batch.rows_per_step, config.data.row_length, config.data.max_segment
    shards, streams = config.data.shuffle_shards, config.data.streams
    sources = [
        source_of(dataset, length, max_segment, weight, shards, streams)
        for dataset, weight in zip(datasets, weights, strict=True)
    ]
    fingerprints = [dataset.fingerprint for dataset in datasets]
    blocks = [source.shuffle_shards for source in sources]
    order = fingerprint(fingerprints, weights, config.seed, rows, length, max_segment, blocks, streams)
    return Plan(sources, config.seed, rows, length, config.epochs), order


def target_coverage_lines(job: TrainJob) -> list[str]:
    """A line for each supervised dataset: the number of its targets that a run trains on.

    Other datasets lose only the first concept of each segment, a number that their shards' counts do not give.
    """
    data, lines = job.config.data, []
    for scope, dataset in [*(("an epoch", each) for each in job.datasets), ("validation", job.validation)]:
        if dataset is not None and dataset.info.supervised is not None:
            targets = target_reach(dataset, data.row_length, data.max_segment)
            lost = targets.all - targets.reached
            reason = f"; {lost:,} are lost: documents longer than {length_limit(data.row_length, data.max_segment)}"
            lines.append(
                f"{dataset.path}: {scope} reaches {targets.reached:,} of {targets.all:,} targets"
                + (reason if lost else "")
            )
    return lines


def _step_errors(job: ConfiguredRun, path: str | Path) -> list[str]:
    """Settings of `train` and `log` without effect, and a warm-up longer than the run."""
    train, lines = job.config.train, []
    warmup, total = job.config.optim.schedule.warmup_steps, job.total_steps
    if total is not None and warmup >= total and not candidates(job.run_dir):  # a run with a checkpoint may end early
        lines.append(
            f"{path}: optim.schedule.warmup_steps: {warmup}: the run has {total} steps and would never reach "
            f"optim.lr; the LCM paper's 4 % would be {max(1, total // 25)}"
        )
    if train.recompute_every is not None and "activation_checkpointing" not in job.ds:
        lines.append(
            f"{path}: train.recompute_every: {train.recompute_every}: has no effect without train.recompute: layer"
        )
    if total is not None and train.profile_steps is not None and train.profile_steps[0] >= total:
        lines.append(f"{path}: train.profile_steps: {list(train.profile_steps)}: the run has steps 0 to {total - 1}")
    return lines + [f"{path}: {line}" for line in (*_fp8_errors(job), *missing_packages(job.config.log))]


def _fp8_errors(job: ConfiguredRun) -> Iterator[str]:
    """What the run lacks for products in fp8, if it wants them."""
    train, dtype = job.config.train, deepspeed_config.precision(job.ds)
    if train.precision is None:
        return
    if importlib.util.find_spec("torchao") is None:
        yield f"train.precision: {train.precision} needs the package torchao: pip install 'lcm-ds[fp8]'"
    if dtype != "bfloat16":
        yield f"train.precision: {train.precision} needs bf16 in the DeepSpeed JSON, not {dtype}"
    if deepspeed_config.zero_stage(job.ds) == 3:
        yield f"train.precision: {train.precision} needs ZeRO 0 to 2: ZeRO-3 could not free gathered weights"
    if train.precision == "fp8" and not train.compile:
        yield "train.precision: fp8 needs train.compile: true: uncompiled, conversions cost more than fp8 saves"
    sizes = {
        "model.hidden_size": job.model.hidden_size,
        "model.intermediate_size": job.model.intermediate_size,
        "batch.micro_batch_rows · data.row_length": job.config.batch.micro_batch_rows * job.config.data.row_length,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            yield f"train.precision: {train.precision} needs multiples of {FP8_MULTIPLE}, but {name} is {size}"


def _read_ds(value: Any, path: Path) -> dict[str, Any] | None:
    return deepspeed_config.read(value, path) if isinstance(value, str | dict) else None


def _ds_origin(config: TrainConfig, path: str | Path) -> str:
    return config.deepspeed if isinstance(config.deepspeed, str) else f"{path}: deepspeed"


def _train_paths(data: dict[str, Any]) -> list[Any]:
    train = data.get("train")
    if isinstance(train, list):
        return [entry.get("path") if isinstance(entry, dict) else entry for entry in train]
    return [train]


def _open(
    value: Any, key: str, data: dict[str, Any], path: str | Path, sizes: bool, errors: Collector
) -> Dataset | None:
    if not isinstance(value, str):
        return None
    cache_dir, cache_gb = data.get("cache_dir"), data.get("cache_gb")
    cache_limit = cache_gb if isinstance(cache_gb, int | float) else None
    cache = Cache.of(cache_dir, cache_limit) if isinstance(cache_dir, str) else None
    checksums, skip_bad = data.get("verify") != "size", data.get("on_bad_shard") == "skip"
    with errors:
        try:
            return indexed(open_dataset(value, cache, checksums, sizes, skip_bad))
        except InputError as error:
            raise type(error)(f"{path}: {key}: {line}" for line in error.errors) from None
    return None


def _dataset_errors(datasets: Sequence[Dataset], model: Sizes | None, path: str | Path) -> list[str]:
    """Datasets that do not fit the model or each other."""
    lines = []
    for dataset in datasets:
        if model is not None and dataset.embed_dim != model.embed_dim:
            lines.append(
                f"{path}: model.embed_dim: is {model.embed_dim}, but the concepts of {dataset.path} have "
                f"{dataset.embed_dim} dimensions; set model.embed_dim={dataset.embed_dim}"
            )
    for dataset in datasets[1:]:
        if dataset.embed_dim != datasets[0].embed_dim:
            lines.append(
                f"{path}: data: {dataset.path} has concepts of {dataset.embed_dim} dimensions, "
                f"{datasets[0].path} of {datasets[0].embed_dim}; all datasets of a run need the same"
            )
        if not same_space(dataset.info.encoder, datasets[0].info.encoder):
            lines.append(
                f"{path}: data: {dataset.path} was encoded with {dataset.info.encoder}, "
                f"{datasets[0].path} with {datasets[0].info.encoder}; all datasets of a run need the same encoder"
            )
        elif _different_end_of_text(dataset, datasets[0]) and not _other_language(dataset, datasets[0]):
            lines.append(
                f"{path}: data: documents of {dataset.path} end with {_end_of_text(dataset)}, "
                f"those of {datasets[0].path} with {_end_of_text(datasets[0])}; all datasets of a run need the same"
            )
    supervised = [(d, d.info.supervised.source_suffix) for d in datasets if d.info.supervised is not None]
    for dataset, suffix in supervised[1:]:
        if suffix != supervised[0][1]:
            lines.append(
                f"{path}: data: sources of {dataset.path} end with {suffix!r}, those of {supervised[0][0].path} with "
                f"{supervised[0][1]!r}; all datasets of a run need the same source_suffix"
            )
    return lines


def encoder_lines(job: TrainJob) -> list[str]:
    """A line for each dataset whose encoder differs from the first one's, though its concepts are in the same space."""
    datasets = [*job.datasets, *([job.validation] if job.validation else [])]
    lines = []
    for dataset in datasets[1:]:
        parts = [encoder_differences(datasets[0].info.encoder, dataset.info.encoder)]
        if parts[0] and _different_end_of_text(dataset, datasets[0]):
            parts.append("their documents end with other concepts, and generation stops at the first one's")
        if parts[0]:
            lines.append(f"{datasets[0].path} and {dataset.path}: one encoder, but {'; '.join(parts)}")
    return lines


def _other_language(one: Dataset, other: Dataset) -> bool:
    """Whether both were encoded as texts of different languages, so that the same end of text is another concept."""
    ends = one.info.end_of_text, other.info.end_of_text
    return None not in ends and one.info.encoder.get("language") != other.info.encoder.get("language")


def _different_end_of_text(one: Dataset, other: Dataset) -> bool:
    """Whether documents end differently, by text or concept; an end missing in dataset.json counts as different."""
    ends = one.info.end_of_text, other.info.end_of_text
    if ends[0] is None or ends[1] is None:
        return ends[0] is not ends[1]
    if ends[0].text != ends[1].text:
        return True
    a, b = np.array(ends[0].vector), np.array(ends[1].vector)
    return a.shape == b.shape and bool(np.linalg.norm(a - b) > END_OF_TEXT_TOLERANCE * np.linalg.norm(b))


def _end_of_text(dataset: Dataset) -> str:
    """For messages: with the first values, because the same text may have another concept."""
    end = dataset.info.end_of_text
    if end is None:
        return "no end that dataset.json names"
    return f"{end.text!r} ({', '.join(f'{value:.4g}' for value in end.vector[:3])} …)"


def _normalizer_errors(
    training: Sequence[Dataset], validation: Dataset | None, config: TrainConfig, path: str | Path
) -> Iterator[str]:
    """Datasets whose normaliser is not bit-identical to that of the first one, which the run uses."""
    if not training:
        return
    first = training[0].path

    def differs(dataset: Dataset) -> bool:
        pairs = zip(read_normalizer(dataset.path), read_normalizer(first), strict=True)
        return any(own.tobytes() != of_first.tobytes() for own, of_first in pairs)

    weights = {entry.weight for entry in config.data.train}
    named = " ".join(f"{each.path}={each.weight:g}" if len(weights) > 1 else each.path for each in config.data.train)
    for dataset in filter(differs, training[1:]):
        yield (
            f"{path}: data.train: {dataset.path} and {first} have different normalisers; fit a common one: "
            f"lcm-ds fit-normalizer {named}"
        )
    if validation is not None and differs(validation):
        yield (
            f"{path}: data.validation: {validation.path} and {first} have different normalisers; copy "
            f"{first}/{NORMALIZER} there"
        )
