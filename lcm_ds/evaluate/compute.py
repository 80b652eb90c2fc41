"""The metrics of a model and its baselines on the same targets, over all ranks.

Three passes over data: the training data that baselines are fitted on, the targets, and the candidates of retrieval.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcm_ds import metrics
from lcm_ds.baselines.linear import MEAN, RIDGES
from lcm_ds.baselines.targets import Rows, TargetReader
from lcm_ds.data.batch import Batch
from lcm_ds.data.format import Dataset
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.errors import InputError
from lcm_ds.evaluate.accumulator import BUCKETS, Accumulator, bootstrap_weights, bucket_of, interval, json_float
from lcm_ds.evaluate.baselines import LINEAR_CONCEPTS, NEAREST, Predictor, fit_baselines
from lcm_ds.evaluate.groups import Groups
from lcm_ds.evaluate.languages import Languages, languages_of
from lcm_ds.evaluate.target_sample import BottomKSampler, TargetSample, count_nearer
from lcm_ds.evaluate.task import EvaluationTask
from lcm_ds.evaluate.text_metrics import TextMetrics
from lcm_ds.metrics import NORMALISED, RAW
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.modeling import BaseLCM

MODEL = "Base-LCM"
TRUTH = "truth"
LANGUAGE = "by_language/"  # begins the names of means over the targets of one language
BY_LANGUAGE = ("mse", "cosine")  # in normalised and in raw space
RETRIEVAL_TARGETS = 8192  # targets, at most, that are ranked among all concepts


@torch.no_grad()
def measure(
    model: BaseLCM,
    task: EvaluationTask,
    ranks: Ranks,
    text_metrics: TextMetrics,
    samples: int,
    baseline_concepts: int = LINEAR_CONCEPTS,
) -> dict[str, Any]:
    """Compute all metrics, the same on each rank; a collective call. lcm_ds/metrics.py defines them.

    Args:
        model: moved to the ranks' device.
        task: the data.
        ranks: all of which call this.
        text_metrics: computes those that need text.
        samples: targets to decode for them.
        baseline_concepts: of the training data, at most, that linear baselines are fitted to.

    Raises:
        InputError: if the validation dataset has no targets.
    """
    started = time.perf_counter()
    model.to(ranks.device)
    reader = TargetReader(task.data, ranks.rank, ranks.size)
    baselines = fit_baselines(reader, task.training, task.weights, model.normalizer, ranks, baseline_concepts)
    sample_size = max(RETRIEVAL_TARGETS, samples)
    groups = Groups(task.validation)
    accumulators, sample = _pass_over_targets(
        model, reader, ranks, task.validation, groups, baselines.predictors, sample_size
    )
    if not len(sample):
        raise InputError(f"{task.validation.path}: holds nothing to predict: each of its documents is a single concept")
    ranked = sample.smallest(RETRIEVAL_TARGETS)
    for name, nearer in count_nearer(ranked, _candidates(reader, task.validation), ranks).items():
        values = {
            "recall_at_1": metrics.recall_at(1, nearer),
            "recall_at_10": metrics.recall_at(10, nearer),
            "mrr": metrics.reciprocal_rank(nearer),
        }
        _add_sampled(accumulators[name], ranked, groups, values)
    missing = sum(ranks.gather(reader.missing))
    decoded = sample.smallest(samples)
    for name, values in text_metrics.compute(decoded, task.validation, ranks).items():
        _add_sampled(accumulators[name], decoded, groups, values)
    totals = task.validation.info.totals
    return {
        "documents": totals.documents,
        **({"groups": groups.count} if groups.named else {}),
        "targets": int(accumulators[MODEL].counts(f"{NORMALISED}/mse")),
        "baselines": baselines.to_json(),
        "retrieval": {"targets": len(ranked), "candidates": totals.concepts},
        "decoded": len(decoded) if text_metrics.decoder is not None else 0,
        "missing_concepts": missing,
        "notes": [
            *task.notes,
            *text_metrics.notes,
            *_missing_baselines(task),
            *([f"{missing:,} concepts of unreadable shards are missing"] if missing else []),
        ],
        **_summarise(accumulators, baselines.best),
        "processes": ranks.size,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_waiting_for_data": round(reader.waited, 1),
    }


def _missing_baselines(task: EvaluationTask) -> list[str]:
    """A note on the baselines that are not in the table, if there are such."""
    if task.training:
        return []
    if not task.missing:
        return ["the training data is unknown: the copy is the only baseline"]
    names = ", ".join((MEAN, *RIDGES, NEAREST))
    return [f"the training data is not here ({', '.join(task.missing)}): without the baselines {names}"]


def _pass_over_targets(
    model: BaseLCM,
    reader: TargetReader,
    ranks: Ranks,
    validation: Dataset,
    groups: Groups,
    baselines: Mapping[str, Predictor],
    sample_size: int,
) -> tuple[dict[str, Accumulator], TargetSample]:
    """The sums of every predictor over the targets of all ranks, and a sample of these targets.

    Args:
        model: in evaluation mode.
        reader: of this rank's share.
        ranks: all of which call this.
        validation: the targets' dataset.
        groups: of its documents.
        baselines: by name.
        sample_size: targets of the sample.
    """
    normalizer = model.normalizer
    accumulators = {name: Accumulator(ranks.device) for name in (MODEL, *baselines, TRUTH)}
    sampler = BottomKSampler(sample_size)
    languages = languages_of(validation)
    for name in (MODEL, *baselines):
        for language in languages.names:
            for metric in BY_LANGUAGE:
                accumulators[name].declare(f"{LANGUAGE}{language}/{metric}")
    for batch, rows in reader.rows(validation, normalizer):
        truth = rows.concepts[:, 1:][rows.mask]
        group = groups.of(rows.targets.document)
        _add_vectors(accumulators[TRUTH], rows.targets.truth, truth, group)
        truth_cosine = rows.max_context_cosine(truth)
        compared = {
            space: metrics.others(vectors, rows.targets.document, rows.targets.position)
            for space, vectors in ((NORMALISED, rows.targets.truth), (RAW, truth))
        }
        raw = {}
        for name in (MODEL, *baselines):
            predicted = _predict(model, batch, rows, reader) if name == MODEL else baselines[name](rows.targets)
            raw[name] = normalizer.denormalize(predicted)
            _add(accumulators[name], predicted, raw[name], truth, truth_cosine, rows, group, compared)
            _add_by_language(accumulators[name], predicted, raw[name], truth, rows, group, languages)
        sampler.add(rows.targets, truth, raw)
    for accumulator in accumulators.values():
        accumulator.all_reduce(ranks)
    return accumulators, sampler.gather(ranks)


def _predict(model: BaseLCM, batch: Batch, rows: Rows, reader: TargetReader) -> Tensor:
    """The model's predictions of the targets: fp32 [n, embed_dim], normalised space."""
    layout = SegmentLayout.from_ids(batch.segment_ids, reader.data.max_segment, model.config.attention)
    return model(rows.concepts, layout)[:, :-1][rows.mask].float()


def _add(
    accumulator: Accumulator,
    predicted: Tensor,
    raw: Tensor,
    raw_truth: Tensor,
    truth_cosine: Tensor,
    rows: Rows,
    group: Tensor,
    compared: Mapping[str, Sequence[Tensor]],
) -> None:
    """Add a predictor's metrics on the n targets of a batch.

    Args:
        accumulator: the predictor's.
        predicted: [n, embed_dim], normalised space.
        raw: the same in raw space.
        raw_truth: [n, embed_dim].
        truth_cosine: [n], the largest cosine of each target to its context.
        rows: the batch.
        group: int64 [n], the groups of the targets' documents.
        compared: in each space, which targets contrastive accuracy compares (`metrics.others`).
    """
    targets = rows.targets
    buckets = bucket_of(targets.position)
    for space, values, truth in ((NORMALISED, predicted, targets.truth), (RAW, raw, raw_truth)):
        error, cosine = metrics.squared_error(values, truth), metrics.cosine(values, truth)
        accumulator.add(f"{space}/mse", error, group)
        accumulator.add(f"{space}/l2", metrics.l2(values, truth), group)
        accumulator.add(f"{space}/cosine", cosine, group)
        accuracy = metrics.contrastive_accuracy(values, truth, compared[space])
        accumulator.add(f"{space}/ca", accuracy, group)
        if space == NORMALISED:
            accumulator.add("by_position/mse", error, group, buckets)
        else:
            accumulator.add("by_position/cosine", cosine, group, buckets)
    accumulator.add(f"{RAW}/par", metrics.paraphrasing(rows.max_context_cosine(raw), truth_cosine), group)
    _add_vectors(accumulator, predicted, raw, group)


def _add_by_language(
    accumulator: Accumulator,
    predicted: Tensor,
    raw: Tensor,
    raw_truth: Tensor,
    rows: Rows,
    group: Tensor,
    languages: Languages,
) -> None:
    """Add a predictor's metrics on the targets of each language; as `_add`."""
    if not languages.names:
        return
    targets = rows.targets
    own = languages.of_document.to(targets.document.device)[targets.document]
    values = metrics.squared_error(predicted, targets.truth), metrics.cosine(raw, raw_truth)
    for index, name in enumerate(languages.names):
        of_it = own == index
        for metric, each in zip(BY_LANGUAGE, values, strict=True):
            accumulator.add(f"{LANGUAGE}{name}/{metric}", each[of_it], group[of_it])


def _add_vectors(accumulator: Accumulator, normalised: Tensor, raw: Tensor, group: Tensor) -> None:
    accumulator.add_vectors(NORMALISED, normalised, group)
    accumulator.add_vectors(RAW, raw, group)
    accumulator.add_spectrum(normalised, group)


def _add_sampled(accumulator: Accumulator, sample: TargetSample, groups: Groups, values: Mapping[str, Tensor]) -> None:
    """Add metrics of sampled targets, [n] each, which are the same on all ranks."""
    for name, each in values.items():
        drawn = each, groups.of(sample.document)
        accumulator.add(f"{RAW}/{name}", *(tensor.to(accumulator.device) for tensor in drawn))


def _candidates(reader: TargetReader, dataset: Dataset) -> Iterator[Tensor]:
    """All concepts of this rank's share: [m, embed_dim], raw space."""
    for batch in reader.batches(dataset):
        yield batch.concepts[batch.segment_ids >= 0].float()


# --- from sums to metrics ---------------------------------------------------------------------------------------------


def _summarise(accumulators: Mapping[str, Accumulator], best_baseline: str) -> dict[str, Any]:
    """scores, intervals, by_position, truth, and the difference to the best baseline, for JSON."""
    groups = accumulators[MODEL].groups
    once, resampled = torch.ones(1, len(groups), dtype=torch.float64, device=groups.device), bootstrap_weights(groups)
    truth = accumulators[TRUTH].variances(once)
    truth_replicates = None if resampled is None else accumulators[TRUTH].variances(resampled)
    scores: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    by_position: dict[str, Any] = {}
    errors: dict[str, Tensor] = {}
    by_language: dict[str, Any] = {}
    for name, accumulator in accumulators.items():
        values = accumulator.means(once)
        replicates = {} if resampled is None else accumulator.means(resampled)
        for key in [key for key in values if key.startswith(LANGUAGE)]:
            language, metric = key.removeprefix(LANGUAGE).split("/")
            of_it = by_language.setdefault(language, {"targets": int(accumulator.counts(key)), "predictors": {}})
            found = of_it["predictors"].setdefault(name, {})
            found[metric] = json_float(values.pop(key)[0])
            found[f"{metric}_interval"] = interval(replicates.pop(key)) if replicates else None
        if name != TRUTH:
            values |= _ratios(accumulator.variances(once), truth)
            if resampled is not None and truth_replicates is not None:
                replicates |= _ratios(accumulator.variances(resampled), truth_replicates)
                errors[name] = replicates[f"{NORMALISED}/mse"]
            by_position[name] = _by_position(values, replicates)
        effective_rank, rank_interval = accumulator.effective_rank()
        scores[name] = _nested({key: json_float(value[0]) for key, value in values.items() if value.dim() == 1})
        scores[name][NORMALISED]["effective_rank"] = effective_rank
        intervals[name] = _nested({key: interval(value) for key, value in replicates.items() if value.dim() == 1})
        intervals[name][NORMALISED]["effective_rank"] = rank_interval
    counts = accumulators[MODEL].counts("by_position/mse").tolist()
    return {
        "truth": {"scores": scores.pop(TRUTH), "intervals": intervals.pop(TRUTH)},
        "scores": scores,
        "intervals": intervals,
        "difference": _difference(scores, errors, best_baseline),
        **({"by_language": by_language} if by_language else {}),
        "by_position": {
            "positions": [list(bucket) for bucket in BUCKETS],
            "targets": [int(count) for count in counts],
            "predictors": by_position,
        },
    }


def _ratios(predictions: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Variance of the predictions over that of the targets; NaN if all targets are equal."""
    return {
        f"{space}/variance_ratio": torch.where(truth[space] > metrics.CONSTANT, values / truth[space], torch.nan)
        for space, values in predictions.items()
    }


def _by_position(values: Mapping[str, Tensor], replicates: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means of each bucket and their intervals."""
    result: dict[str, Any] = {}
    for metric in ("mse", "cosine"):
        key = f"by_position/{metric}"
        result[metric] = [json_float(value) for value in values[key][0]]
        result[f"{metric}_intervals"] = (
            [interval(each) for each in replicates[key].T] if key in replicates else [None] * len(BUCKETS)
        )
    return result


def _difference(
    scores: Mapping[str, Any], replicates: Mapping[str, Tensor], best_baseline: str
) -> dict[str, Any] | None:
    """The model's MSE less the baseline's; the interval is of paired differences, over the same documents."""
    model, baseline = (scores[name][NORMALISED]["mse"] for name in (MODEL, best_baseline))
    if model is None or baseline is None:  # not finite
        return None
    return {
        "of": MODEL,
        "less": best_baseline,
        "metric": "mse",
        "space": NORMALISED,
        "value": model - baseline,
        "interval": interval(replicates[MODEL] - replicates[best_baseline]) if replicates else None,
    }


def _nested(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"space/metric": value} → {space: {metric: value}}."""
    nested: dict[str, dict[str, Any]] = {NORMALISED: {}, RAW: {}}
    for key, value in flat.items():
        space, metric = key.split("/")
        nested[space][metric] = value
    return nested
