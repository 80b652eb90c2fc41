"""`lcm-ds compare`: several models on the same targets, with paired differences and what each of them has cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_ds import metrics
from lcm_ds.baselines.linear import COPY, TrainingSums, best_of, training_targets
from lcm_ds.baselines.targets import TargetReader, Targets
from lcm_ds.checkpoint.model_source import ModelSource, find_model
from lcm_ds.data.format import Dataset
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.errors import Collector, InputError
from lcm_ds.evaluate.accumulator import Accumulator, Interval, Values, bootstrap_weights, interval
from lcm_ds.evaluate.baselines import LINEAR_CONCEPTS, Predictor
from lcm_ds.evaluate.comparison_report import draw_figure, print_table
from lcm_ds.evaluate.groups import Groups
from lcm_ds.evaluate.task import EvaluationTask, open_task
from lcm_ds.files import output_file_error, write_named
from lcm_ds.metrics import VERSION
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.flops import training_flops
from lcm_ds.model.modeling import BaseLCM

METRICS = ("mse", "mse_raw", "cosine")  # of a target: normalised space, raw space, raw space
_POSITION_BITS = 24  # of a target's key: its document, then its position in that


class Cost(NamedTuple):
    """What training has cost; None if the run's metrics.jsonl does not tell."""

    concepts: int | None  # read
    seconds: float | None  # of its steps, without validating and saving
    flops: int | None  # of the model, forward and backward


class TargetErrors(NamedTuple):
    """The metrics of a predictor on each target, in the order of the keys."""

    keys: Tensor  # int64 [n], sorted: document << 24 | position
    values: Tensor  # fp32 [n, len(METRICS)]


@dataclass(frozen=True)
class _Measured:
    """A model and its best baseline on its own targets."""

    name: str
    source: ModelSource
    parameters: int
    normalizer: tuple[Tensor, Tensor]
    cost: Cost
    model: TargetErrors
    baseline: TargetErrors | None
    baseline_name: str | None


@torch.no_grad()
def compare(
    runs: Sequence[str | Path],
    dataset: str | None = None,
    json_path: str | None = None,
    figure: str | None = None,
    baselines: bool = True,
) -> dict[str, Any]:
    """Compare models on the targets that all of them have, and print a table.

    Args:
        runs: runs or exported folders, each once; differences are to the first.
        dataset: to evaluate on; default: the validation dataset that all runs have.
        json_path: a file to write the result to.
        figure: a PNG file to plot it to.
        baselines: whether the best linear baseline is fitted to the training data of each run.

    Returns:
        The result, as in the JSON.

    Raises:
        InputError: with every mistake: a run that is named twice, or has no model; datasets that differ or cannot be
            opened; a file that cannot be written; no targets that all models have.
    """
    errors = Collector()
    for option, path in (("--json", json_path), ("--figure", figure)):
        if path is not None and (problem := output_file_error(option, path)) is not None:
            errors.errors.append(problem)
    names = [str(run) for run in runs]
    errors.errors += [f"{name}: is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if len(names) < 2:
        errors.errors.append("compare: name two runs or more")
    opened: list[tuple[ModelSource, EvaluationTask]] = []
    for name in names:
        with errors:
            source = find_model(name)
            opened.append((source, open_task(source, dataset or source.data.validation)))
    errors.raise_if_any()
    validation = opened[0][1].validation
    for name, (_, task) in zip(names, opened, strict=True):
        if task.validation.fingerprint != validation.fingerprint:
            errors.errors.append(
                f"{name}: is validated on {task.validation_path}, {names[0]} on {opened[0][1].validation_path}: "
                "name one dataset with --dataset"
            )
    errors.raise_if_any()
    fitted: dict[str, tuple[str, Predictor]] = {}
    measured = [
        _measure(name, source, task, fitted if baselines else None)
        for name, (source, task) in zip(names, opened, strict=True)
    ]
    result = {
        "format_version": VERSION,
        "dataset": opened[0][1].validation_path,
        "validation": validation.fingerprint,
        **_paired(measured, validation),
    }
    print_table(result)
    if json_path is not None:
        write_named("--json", json_path, json.dumps(result, indent=1) + "\n")
    if figure is not None:
        write_named("--figure", figure, draw_figure(result))
    return result


def _measure(
    name: str, source: ModelSource, task: EvaluationTask, fitted: dict[str, tuple[str, Predictor]] | None
) -> _Measured:
    """Compute a model's errors on its targets.

    Args:
        name: as the user gives it.
        source: the model.
        task: the data.
        fitted: the best baseline of each training data that was met before; None for no baseline.

    Returns:
        The errors, and those of the best baseline if the training data is there.
    """
    ranks = Ranks()
    model = source.load()
    model.to(ranks.device)
    reader = TargetReader(task.data)
    baseline_name, baseline = None, None
    if fitted is not None and task.training:
        key = _training_key(task, model)
        if key not in fitted:
            targets = training_targets(reader, task.training, task.weights, model.normalizer, LINEAR_CONCEPTS)
            sums = TrainingSums.from_targets(targets, model.config.embed_dim, ranks.device, ranks.all_reduce)
            linear = {name: each for name, each in sums.predictors().items() if name != COPY}
            baseline_name = best_of(linear)
            fitted[key] = baseline_name, linear[baseline_name]
        baseline_name, baseline = fitted[key]
    found, pairs = _pass_over_targets(model, reader, task.validation, baseline)
    return _Measured(
        name,
        source,
        model.num_parameters(),
        (model.normalizer.center.cpu(), model.normalizer.scale.cpu()),
        _cost(source, model, pairs),
        found[0],
        found[1] if baseline is not None else None,
        baseline_name,
    )


def _training_key(task: EvaluationTask, model: BaseLCM) -> str:
    """What a fitted baseline depends on."""
    data = [[each.fingerprint, weighted.weight] for each, weighted in zip(task.training, task.weights, strict=True)]
    normalizer = [model.normalizer.center.tolist(), model.normalizer.scale.tolist()]
    return json.dumps([data, task.data.row_length, task.data.max_segment, normalizer])


def _pass_over_targets(
    model: BaseLCM, reader: TargetReader, validation: Dataset, baseline: Predictor | None
) -> tuple[list[TargetErrors], float]:
    """The errors of the model, and of the baseline if there is one, and how many concepts a concept sees on average.

    Args:
        model: on its device.
        reader: cuts rows as in the model's run.
        validation: the dataset.
        baseline: a predictor of targets.
    """
    normalizer = model.normalizer
    keys: list[Tensor] = []
    values: list[list[Tensor]] = [[] for _ in range(1 if baseline is None else 2)]
    seen = concepts = 0
    for batch, rows in reader.rows(validation, normalizer):
        layout = SegmentLayout.from_ids(batch.segment_ids, reader.data.max_segment, model.config.attention)
        real = batch.segment_ids >= 0
        seen += int((layout.positions[real] + 1).sum())
        concepts += int(real.sum())
        targets, truth = rows.targets, rows.concepts[:, 1:][rows.mask]
        predictions = [model(rows.concepts, layout)[:, :-1][rows.mask].float()]
        predictions += [] if baseline is None else [baseline(targets)]
        keys.append(((targets.document << _POSITION_BITS) + targets.position).cpu())
        for own, predicted in zip(values, predictions, strict=True):
            own.append(_values(predicted, normalizer.denormalize(predicted), targets, truth))
    key = torch.cat(keys) if keys else torch.empty(0, dtype=torch.int64)
    order = key.argsort()
    found = [TargetErrors(key[order], torch.cat(own)[order]) for own in values] if keys else []
    return found or [TargetErrors(key, torch.empty(0, len(METRICS)))] * len(values), seen / max(1, concepts)


def _values(predicted: Tensor, raw: Tensor, targets: Targets, raw_truth: Tensor) -> Tensor:
    """METRICS of n targets: fp32 [n, 3] on the CPU.

    Args:
        predicted: [n, embed_dim], normalised space.
        raw: the same in raw space.
        targets: with the truth in normalised space.
        raw_truth: [n, embed_dim].
    """
    normalised, in_raw = metrics.squared_error(predicted, targets.truth), metrics.squared_error(raw, raw_truth)
    return torch.stack([normalised, in_raw, metrics.cosine(raw, raw_truth)], dim=1).cpu()


def _cost(source: ModelSource, model: BaseLCM, pairs: float) -> Cost:
    """What training has cost until this checkpoint.

    Args:
        source: of the model.
        model: its sizes count.
        pairs: how many concepts a concept sees on average, itself included.
    """
    concepts, seconds = (0, 0.0) if source.step is None else concepts_and_seconds(source.path, source.step)
    if not concepts:
        return Cost(None, None, None)
    return Cost(concepts, seconds, training_flops(model.config, concepts, round(pairs * concepts)))


def concepts_and_seconds(run_dir: Path, step: int) -> tuple[int, float]:
    """The concepts that a run has read in its first steps, and the seconds of these steps, by metrics.jsonl.

    run_dir: the run. step: the number of steps. Zeros if the file is not there.
    """
    path = run_dir / "metrics.jsonl"
    concepts, seconds, before = 0, 0.0, 0
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):  # a line that is being written
            line = json.loads(text)
            if line["step"] <= step and line.get("step_time") is not None:
                concepts, seconds = line["concepts"], seconds + line["step_time"] * (line["step"] - before)
                before = line["step"]
    return concepts, seconds


def _paired(measured: Sequence[_Measured], validation: Dataset) -> dict[str, Any]:
    """Means, intervals and differences of all models over the targets that all of them have.

    Args:
        measured: the models; differences are to the first.
        validation: the targets' dataset.

    Raises:
        InputError: there are no such targets.
    """
    keys = measured[0].model.keys
    for each in measured[1:]:
        keys = keys[torch.isin(keys, each.model.keys, assume_unique=True)]
    if not len(keys):
        raise InputError(f"{validation.path}: no target is one of all models: compare runs with a longer max_segment")
    groups = Groups(validation)
    units = groups.of(keys >> _POSITION_BITS)
    weights = bootstrap_weights(_accumulate(measured[0].model, keys, units).groups)
    first = _estimates(measured[0].model, keys, units, weights)
    same = all(_same(each.normalizer, measured[0].normalizer) for each in measured)
    runs: list[dict[str, Any]] = []
    for each in measured:
        own = _estimates(each.model, keys, units, weights)
        compared = () if each is measured[0] else METRICS if same else METRICS[1:]
        block: dict[str, Any] = {
            "run": each.name,
            "step": each.source.step,
            "parameters": each.parameters,
            "targets": len(each.model.keys),
            **each.cost._asdict(),
            "scores": own.scores(METRICS),
            "less_first": own.less(first, compared),
        }
        if each.baseline is not None:
            baseline = _estimates(each.baseline, keys, units, weights)
            block["baseline"] = {
                "name": each.baseline_name,
                "scores": baseline.scores(METRICS),
                "model_less_baseline": own.less(baseline, METRICS),
            }
        runs.append(block)
    return {
        "targets": len(keys),
        "documents": len((keys >> _POSITION_BITS).unique()),
        **({"groups": len(units.unique())} if groups.named else {}),
        "one_normaliser": same,
        "runs": runs,
    }


def _same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class _Estimates(NamedTuple):
    """Means of METRICS by name, and their bootstrap replicates; None with a single document or group."""

    means: Mapping[str, float]
    replicates: Values | None

    def scores(self, names: Sequence[str]) -> dict[str, dict[str, float | Interval | None]]:
        """Value and interval of each metric."""
        return {
            name: {
                "value": self.means[name],
                "interval": None if self.replicates is None else interval(self.replicates[name]),
            }
            for name in names
        }

    def less(self, other: _Estimates, names: Sequence[str]) -> dict[str, dict[str, float | Interval | None]]:
        """Differences to another predictor on the same targets, with the intervals of paired differences."""
        found: dict[str, dict[str, float | Interval | None]] = {}
        for name in names:
            paired = None
            if self.replicates is not None and other.replicates is not None:
                paired = interval(self.replicates[name] - other.replicates[name])
            found[name] = {"value": self.means[name] - other.means[name], "interval": paired}
        return found


def _accumulate(errors: TargetErrors, keys: Tensor, units: Tensor) -> Accumulator:
    """The sums of a predictor's errors over some targets.

    Args:
        errors: of the predictor.
        keys: int64 [n], of these targets, sorted.
        units: int64 [n], what the bootstrap draws: the documents or groups of these targets.
    """
    values = errors.values[torch.searchsorted(errors.keys, keys)]
    accumulator = Accumulator(torch.device("cpu"))
    for column, name in enumerate(METRICS):
        accumulator.add(name, values[:, column], units)
    return accumulator


def _estimates(errors: TargetErrors, keys: Tensor, units: Tensor, weights: Tensor | None) -> _Estimates:
    """Means and replicates of a predictor; arguments as of `_accumulate`, and the weights of the replicates."""
    accumulator = _accumulate(errors, keys, units)
    once = torch.ones(1, len(accumulator.groups), dtype=torch.float64)
    means = {name: float(value[0]) for name, value in accumulator.means(once).items()}
    assert not any(math.isnan(value) for value in means.values())
    return _Estimates(means, None if weights is None else accumulator.means(weights))
