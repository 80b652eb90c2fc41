"""`lcm-ds evaluate`: a run's model against its baselines, on the same validation targets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_ds.config import DataConfig, TrainConfig, load
from lcm_ds.data.format import Dataset, open_for_run
from lcm_ds.data.loader import Batch, validation_batches
from lcm_ds.errors import Collector, InputError
from lcm_ds.evaluate.baselines import fit_baselines
from lcm_ds.evaluate.metrics import BLOCK, SPACES, Score, Targets
from lcm_ds.files import sha256_of, write_whole
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.train.checkpoint import find, load_model

MODEL = "Base-LCM"
ROWS = 16  # of a batch
FIT_ON = 500_000  # concepts of the training data that baselines are fitted on, at most
FILE = "evaluation.json"


def evaluate(run_dir: str | Path, dataset: str | None = None, json_path: str | None = None) -> dict[str, Any]:
    """Measure the run's newest checkpoint on its validation dataset, or on `dataset`, and print the table.

    Returns what RUN/evaluation.json holds (written for the run's own validation dataset; where it is there already for
    this checkpoint and dataset, it is printed again). Raises InputError for a run without a checkpoint, for a dataset
    that is missing, of another encoder or without targets, and where json_path cannot be written.
    """
    run_dir = Path(run_dir)
    mistakes = Collector()
    # Before the work, not after it.
    if json_path is not None and (Path(json_path).is_dir() or not Path(json_path).absolute().parent.is_dir()):
        mistakes.mistakes.append(f"--json: {json_path}: has to be a file in a folder that is there")
    with mistakes:
        checkpoint = find(run_dir)
        config = load(TrainConfig, run_dir / "config.yaml")
        path = dataset or config.data.validation
        if path is None:
            raise InputError(f"{run_dir}: the run has no data.validation; name a dataset with --dataset")
        training, validation = _open(config.data, path, checkpoint.state()["model"]["embed_dim"])
    mistakes.raise_if_any()
    question = {
        "step": checkpoint.step,
        "checkpoint": sha256_of(checkpoint.path / "COMPLETE"),
        "validation": validation.fingerprint,
    }
    written: Path | str | None = run_dir / FILE
    found = _there_already(run_dir / FILE, question)
    if found is not None:
        print(f"{run_dir / FILE}: already evaluated at step {checkpoint.step}")
    else:
        model, _, _ = load_model(run_dir, checkpoint.step)
        found = {**question, "dataset": path, **measure(model, training, validation, config.data)}
        if dataset is None:
            write_whole(run_dir / FILE, json.dumps(found, indent=1) + "\n")
        else:
            written = json_path
    if json_path is not None:
        Path(json_path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _print_table(run_dir, found, written)
    return found


def _open(data: DataConfig, path: str, embed_dim: int) -> tuple[list[Dataset], Dataset]:
    """The training datasets and the one to measure on, all of the model's embed_dim and of one encoder."""
    mistakes = Collector()
    opened: list[Dataset] = []
    for place in (*(source.path for source in data.train), path):
        with mistakes:
            opened.append(open_for_run(place, data))
    mistakes.raise_if_any()
    *training, validation = opened
    for each in opened:
        if each.embed_dim != embed_dim:
            mistakes.mistakes.append(f"{each.path}: embed_dim {each.embed_dim}, the model has {embed_dim}")
    if validation.info.encoder != training[0].info.encoder:
        mistakes.mistakes.append(
            f"{validation.path}: encoded with {validation.info.encoder}, "
            f"the model is trained on {training[0].info.encoder}"
        )
    mistakes.raise_if_any()
    return training, validation


def measure(model: BaseLCM, training: Sequence[Dataset], validation: Dataset, data: DataConfig) -> dict[str, Any]:
    """Figures of the model and its baselines; under "scores": {predictor: {space: {metric: value}}}.

    training: the datasets of data.train, in its order. Raises InputError where validation has no targets.
    """
    started = time.perf_counter()
    baselines, fitted_on = fit_baselines(_training_targets(model, training, data), model.config.embed_dim)
    scores = {name: {space: Score() for space in SPACES} for name in (MODEL, *baselines)}
    for targets, predicted in _blocks(model, validation, data, predict=True):
        truth = {"normalised": targets.truth, "raw": model.normalizer.denormalize(targets.truth)}
        predictions = {MODEL: predicted, **{name: predict(targets) for name, predict in baselines.items()}}
        for name, values in predictions.items():
            in_space = {"normalised": values, "raw": model.normalizer.denormalize(values)}
            for space in SPACES:
                scores[name][space].add(in_space[space], truth[space], targets)
    if not scores[MODEL]["raw"].count:
        raise InputError(f"{validation.path}: holds nothing to predict: each of its documents is a single concept")
    return {
        "documents": validation.info.totals.documents,
        "targets": scores[MODEL]["raw"].count,
        "baselines_fitted_on": fitted_on,
        "scores": {name: {space: score.read() for space, score in by.items()} for name, by in scores.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _training_targets(model: BaseLCM, training: Sequence[Dataset], data: DataConfig) -> Iterator[Targets]:
    """At most FIT_ON concepts' targets, each dataset's share that of its weight, as in the run."""
    weights = [source.weight for source in data.train]
    for dataset, weight in zip(training, weights, strict=True):
        rows = max(1, round(FIT_ON * weight / sum(weights) / data.row_length))
        yield from (targets for targets, _ in _blocks(model, dataset, data, predict=False, rows=rows))


@torch.no_grad()
def _blocks(
    model: BaseLCM, dataset: Dataset, data: DataConfig, predict: bool, rows: int | None = None
) -> Iterator[tuple[Targets, Tensor]]:
    """All targets of a dataset in order, BLOCK at a time, with the model's predictions (fp32, normalised space)."""
    held: list[tuple[Targets, Tensor]] = []
    count = 0
    for batch in validation_batches(dataset, data.row_length, data.max_segment, ROWS, 0, 1, rows):
        targets, predicted = _targets(model, batch, data.max_segment, predict)
        held.append((targets, predicted))
        count += len(targets)
        if count >= BLOCK:
            whole = _joined(held)
            for first in range(0, count - BLOCK + 1, BLOCK):
                part = slice(first, first + BLOCK)
                yield whole[0][part], whole[1][part]
            rest = slice(count - count % BLOCK, count)
            held, count = [(whole[0][rest], whole[1][rest])], count % BLOCK
    if count:
        yield _joined(held)


def _joined(parts: list[tuple[Targets, Tensor]]) -> tuple[Targets, Tensor]:
    fields = ("truth", "last", "context", "segment", "position")
    targets = Targets(**{name: torch.cat([getattr(part, name) for part, _ in parts]) for name in fields})
    return targets, torch.cat([predicted for _, predicted in parts])


def _targets(model: BaseLCM, batch: Batch, max_segment: int, predict: bool) -> tuple[Targets, Tensor]:
    """The targets of one batch in order, and what the model predicts for them (zeros where it is not asked)."""
    ids = batch.segment_ids.long()
    concepts = model.normalizer.normalize(batch.concepts)
    layout = SegmentLayout.from_ids(batch.segment_ids, max_segment)
    # Running mean inside segments: the running sum, less what it was where the segment begins.
    sums = concepts.double().cumsum(1)
    before = torch.nn.functional.pad(sums, (0, 0, 1, 0))[:, :-1]
    at_start = before.gather(1, layout.starts.unsqueeze(-1).expand_as(before))
    context = ((sums - at_start) / (layout.positions + 1).unsqueeze(-1)).float()
    mask = batch.target_mask
    # Rows are numbered through the dataset, and no row has more segments than concepts.
    rows = torch.arange(batch.first_lane, batch.first_lane + len(ids)).unsqueeze(1)
    targets = Targets(
        truth=concepts[:, 1:][mask],
        last=concepts[:, :-1][mask],
        context=context[:, :-1][mask],
        segment=(rows * ids.shape[1] + ids)[:, 1:][mask],
        position=layout.positions[:, 1:][mask],
    )
    if predict:
        seen = SegmentLayout.from_ids(batch.segment_ids, max_segment, model.config.attention)
        return targets, model(batch.concepts, seen)[:, :-1][mask].float()
    return targets, torch.zeros(len(targets), 0)


def _there_already(path: Path, question: dict[str, Any]) -> dict[str, Any] | None:
    """The evaluation on disk, where it answers this question."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if all(found.get(key) == value for key, value in question.items()) else None


def _print_table(run_dir: Path, found: dict[str, Any], written: Path | str | None) -> None:
    """The figures as a table that anyone can read, the best of each column marked; `written`: where all of them are."""
    from rich.console import Console
    from rich.table import Table

    columns = [
        ("MSE ↓", "normalised", "mse", min, "{:.4f}"),
        ("MSE raw ↓", "raw", "mse", min, "{:.3g}"),
        ("ℓ2 raw ↓", "raw", "l2", min, "{:.4f}"),
        ("cosine ↑", "raw", "cosine", max, "{:.4f}"),
        ("CA % ↑", "raw", "ca", max, "{:.2%}"),
        ("variance ratio", "normalised", "variance_ratio", None, "{:.3f}"),
    ]
    table = Table(
        title=f"{run_dir} at step {found['step']}: next-concept prediction on {found['dataset']}\n"
        f"{found['documents']:,} documents, {found['targets']:,} targets; * best of its column"
    )
    table.add_column("predictor")
    for name, *_ in columns:
        table.add_column(name, justify="right")
    scores = found["scores"]
    for predictor, values in scores.items():
        cells = []
        for _, space, metric, best, form in columns:
            value = values[space][metric]
            if value is None:
                cells.append("–  ")
                continue
            wins = best is not None and value == best(by[space][metric] for by in scores.values())
            cells.append(form.format(value).replace("%", "") + (" *" if wins else "  "))
        table.add_row(predictor, *cells, style="bold" if predictor == MODEL else None)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    print("MSE in normalised space is the training loss; raw space is the encoder's.", end=" ")
    print("--json FILE keeps these figures." if written is None else f"All figures: {written}")
    print(f"curves: tensorboard --logdir {run_dir / 'tensorboard'}")
