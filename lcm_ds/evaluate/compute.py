"""The figures of a model and of its baselines on the same targets, over all ranks.

Three passes over data: the training data that baselines are fitted on, the targets, and the candidates of retrieval.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcm_ds import metrics
from lcm_ds.baselines.targets import Reader, Rows
from lcm_ds.data.batch import Batch
from lcm_ds.data.format import Dataset
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.errors import InputError
from lcm_ds.evaluate.accumulator import BUCKETS, Accumulator, bucket_of, draw, interval, number
from lcm_ds.evaluate.baselines import Predictor, fit_baselines
from lcm_ds.evaluate.subject import Subject
from lcm_ds.evaluate.target_sample import BottomKSampler, TargetSample, count_nearer
from lcm_ds.evaluate.text_metrics import TextMetrics
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.modeling import BaseLCM

MODEL = "Base-LCM"
TRUTH = "truth"
NORMALISED, RAW = "normalised", "raw"
LOOKED_UP = 8192  # targets, at most, whose place among all concepts is told


@torch.no_grad()
def measure(
    model: BaseLCM,
    subject: Subject,
    training: Sequence[Dataset],
    validation: Dataset,
    ranks: Ranks,
    words: TextMetrics,
    samples: int,
) -> dict[str, Any]:
    """All figures, the same on each rank; see docs/evaluation.md for what each is.

    training, validation: the datasets of `subject`. samples: targets that are decoded. All ranks call this. Raises
    InputError where validation has no targets.
    """
    started = time.perf_counter()
    model.to(ranks.device)  # type: ignore[arg-type]
    reader = Reader(subject.data, ranks.rank, ranks.size)
    baselines = fit_baselines(reader, training, subject.training, model.normalizer, ranks)
    tallies, held = _pass_over_targets(model, reader, ranks, validation, baselines.predictors, max(LOOKED_UP, samples))
    if not len(held):
        raise InputError(f"{validation.path}: holds nothing to predict: each of its documents is a single concept")
    looked_up = held.smallest(LOOKED_UP)
    for name, nearer in count_nearer(looked_up, _candidates(reader, validation), ranks).items():
        _add_held(
            tallies[name],
            looked_up,
            {
                "recall_at_1": metrics.recall_at(1, nearer),
                "recall_at_10": metrics.recall_at(10, nearer),
                "mrr": metrics.reciprocal_rank(nearer),
            },
        )
    missing = sum(ranks.gather(reader.missing))
    decoded = held.smallest(samples)
    for name, figures in words.figures(decoded, validation, ranks).items():
        _add_held(tallies[name], decoded, figures)
    return {
        "documents": validation.info.totals.documents,
        "targets": int(tallies[MODEL].counts(f"{NORMALISED}/mse")),
        "baselines": baselines.told(),
        "retrieval": {"targets": len(looked_up), "candidates": validation.info.totals.concepts},
        "decoded": len(decoded) if words.decoder is not None else 0,
        "missing_concepts": missing,
        "notes": [
            *words.notes,
            *([] if training else ["no training data is known: the copy is the only baseline"]),
            *([f"{missing:,} concepts of shards that cannot be read are left out"] if missing else []),
        ],
        **_read(tallies, baselines.best),
        "processes": ranks.size,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_waiting_for_data": round(reader.waited, 1),
    }


def _pass_over_targets(
    model: BaseLCM, reader: Reader, ranks: Ranks, validation: Dataset, baselines: Mapping[str, Predictor], held: int
) -> tuple[dict[str, Accumulator], TargetSample]:
    """The tallies of this rank's targets, added up over all ranks, and some targets of all ranks."""
    normalizer = model.normalizer
    tallies = {name: Accumulator(ranks.device) for name in (MODEL, *baselines, TRUTH)}
    holder = BottomKSampler(held)
    for batch, rows in reader.rows(validation, normalizer):
        truth = rows.concepts[:, 1:][rows.mask]
        _add_vectors(tallies[TRUTH], rows.targets.truth, truth, rows)
        of_truth = rows.to_context(truth)
        raw = {}
        for name in (MODEL, *baselines):
            predicted = _predict(model, batch, rows, reader) if name == MODEL else baselines[name](rows.targets)
            raw[name] = normalizer.denormalize(predicted)
            _add(tallies[name], predicted, raw[name], truth, of_truth, rows)
        holder.add(rows.targets, truth, raw)
    for tally in tallies.values():
        tally.add_up(ranks)
    return tallies, holder.gathered(ranks)


def _predict(model: BaseLCM, batch: Batch, rows: Rows, reader: Reader) -> Tensor:
    """What the model predicts for the targets: fp32 [n, embed_dim], normalised space."""
    layout = SegmentLayout.from_ids(batch.segment_ids, reader.data.max_segment, model.config.attention)
    return model(rows.concepts, layout)[:, :-1][rows.mask].float()


def _add(tally: Accumulator, predicted: Tensor, raw: Tensor, true: Tensor, of_truth: Tensor, rows: Rows) -> None:
    """The figures of a predictor on the targets of a batch: of what it predicts, [n, embed_dim] in both spaces."""
    targets = rows.targets
    document, buckets = targets.document, bucket_of(targets.position)
    for space, values, truth in ((NORMALISED, predicted, targets.truth), (RAW, raw, true)):
        error, cosine = metrics.squared_error(values, truth), metrics.cosine(values, truth)
        tally.add(f"{space}/mse", error, document)
        tally.add(f"{space}/l2", metrics.l2(values, truth), document)
        tally.add(f"{space}/cosine", cosine, document)
        shares = metrics.contrastive_accuracy(values, truth, document, targets.position)
        tally.add(f"{space}/ca", shares, document)
        if space == NORMALISED:
            tally.add("by_position/mse", error, document, buckets)
        else:
            tally.add("by_position/cosine", cosine, document, buckets)
    tally.add(f"{RAW}/par", metrics.paraphrasing(rows.to_context(raw), of_truth), document)
    _add_vectors(tally, predicted, raw, rows)


def _add_vectors(tally: Accumulator, normalised: Tensor, raw: Tensor, rows: Rows) -> None:
    tally.add_vectors(NORMALISED, normalised, rows.targets.document)
    tally.add_vectors(RAW, raw, rows.targets.document)
    tally.add_spectrum(normalised, rows.targets.document)


def _add_held(tally: Accumulator, held: TargetSample, figures: Mapping[str, Tensor]) -> None:
    """Figures of held targets, [n] each, which all ranks have alike."""
    for name, values in figures.items():
        tally.add(f"{RAW}/{name}", *(tensor.to(tally.device) for tensor in (values, held.document)))


def _candidates(reader: Reader, dataset: Dataset) -> Iterator[Tensor]:
    """All concepts of this rank's share: [m, embed_dim], raw space."""
    for batch in reader.batches(dataset):
        yield batch.concepts[batch.segment_ids >= 0].float()


# --- from sums to figures ---------------------------------------------------------------------------------------------


def _read(tallies: Mapping[str, Accumulator], rival: str) -> dict[str, Any]:
    """scores, intervals, by_position, truth, and the difference to the best baseline, for JSON."""
    groups = tallies[MODEL].groups
    whole, again = torch.ones(1, len(groups), dtype=torch.float64, device=groups.device), draw(groups)
    of_truth = tallies[TRUTH].variances(whole)
    again_truth = None if again is None else tallies[TRUTH].variances(again)
    scores: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    by_position: dict[str, Any] = {}
    replicates: dict[str, Tensor] = {}
    for name, tally in tallies.items():
        figures = tally.means(whole)
        drawn = {} if again is None else tally.means(again)
        if name != TRUTH:
            figures |= _ratios(tally.variances(whole), of_truth)
            if again is not None and again_truth is not None:
                drawn |= _ratios(tally.variances(again), again_truth)
                replicates[name] = drawn[f"{NORMALISED}/mse"]
            by_position[name] = _by_position(figures, drawn)
        rank, rank_interval = tally.effective_rank()
        scores[name] = _nested({key: number(value[0]) for key, value in figures.items() if value.dim() == 1})
        scores[name][NORMALISED]["effective_rank"] = rank
        intervals[name] = _nested({key: interval(value) for key, value in drawn.items() if value.dim() == 1})
        intervals[name][NORMALISED]["effective_rank"] = rank_interval
    counts = tallies[MODEL].counts("by_position/mse").tolist()
    return {
        "truth": {"scores": scores.pop(TRUTH), "intervals": intervals.pop(TRUTH)},
        "scores": scores,
        "intervals": intervals,
        "difference": _difference(scores, replicates, rival),
        "by_position": {
            "positions": [list(bucket) for bucket in BUCKETS],
            "targets": [int(count) for count in counts],
            "predictors": by_position,
        },
    }


def _ratios(of_predictions: Mapping[str, Tensor], of_truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Variance of the predictions over that of the targets; NaN where all of those are the same."""
    return {
        f"{space}/variance_ratio": torch.where(of_truth[space] > metrics.CONSTANT, values / of_truth[space], torch.nan)
        for space, values in of_predictions.items()
    }


def _by_position(figures: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means of each bucket and their intervals."""
    found: dict[str, Any] = {}
    for metric in ("mse", "cosine"):
        key = f"by_position/{metric}"
        found[metric] = [number(value) for value in figures[key][0]]
        found[f"{metric}_intervals"] = (
            [interval(values) for values in drawn[key].T] if key in drawn else [None] * len(BUCKETS)
        )
    return found


def _difference(scores: Mapping[str, Any], replicates: Mapping[str, Tensor], rival: str) -> dict[str, Any] | None:
    """The model's mse less that of a baseline: on the same documents, so that the interval is of the pair."""
    own, other = (scores[name][NORMALISED]["mse"] for name in (MODEL, rival))
    if own is None or other is None:  # not finite
        return None
    return {
        "of": MODEL,
        "less": rival,
        "metric": "mse",
        "space": NORMALISED,
        "value": own - other,
        "interval": interval(replicates[MODEL] - replicates[rival]) if replicates else None,
    }


def _nested(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"space/metric": value} → {space: {metric: value}}."""
    found: dict[str, dict[str, Any]] = {NORMALISED: {}, RAW: {}}
    for key, value in flat.items():
        space, metric = key.split("/")
        found[space][metric] = value
    return found
