"""`lcm-ds evaluate`: a model beside its baselines, on the same targets, by one process or several."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lcm_ds.checkpoint.model_source import ModelSource, find_model
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.encoders.from_dataset import decoder_name
from lcm_ds.errors import Collector
from lcm_ds.evaluate.baselines import LINEAR_CONCEPTS
from lcm_ds.evaluate.compute import measure
from lcm_ds.evaluate.report import draw_figure, print_tables
from lcm_ds.evaluate.task import EvaluationTask, open_task
from lcm_ds.evaluate.text_metrics import load_text_metrics
from lcm_ds.files import output_file_error, read_object, write_named
from lcm_ds.metrics import VERSION

FILE, FIGURE = "evaluation.json", "evaluation.png"
SAMPLES = 256  # targets to decode


def evaluate(
    run_dir: str | Path,
    dataset: str | None = None,
    json_path: str | None = None,
    *,
    step: int | None = None,
    figure: str | None = None,
    causal_lm: str | None = None,
    decoder: str | None = None,
    samples: int = SAMPLES,
    baseline_concepts: int = LINEAR_CONCEPTS,
    env: DistEnv | None = None,
) -> dict[str, Any]:
    """Evaluate a model beside its baselines and print the tables.

    With the run's newest checkpoint and its own validation dataset, RUN/evaluation.json and evaluation.png are written;
    if they already answer the same question, they are printed again.

    Args:
        run_dir: a run, or an exported Hugging Face folder (which needs `dataset`).
        dataset: to evaluate on; default: the run's validation dataset.
        json_path: a file to write the metrics to.
        step: of the run's checkpoint; default: the newest.
        figure: a PNG file to plot the error by position to.
        causal_lm: hub id or folder of a language model, for mutual information.
        decoder: hub id or folder of a decoder; default: the encoder's own, if it has one.
        samples: targets to decode for the metrics that need text.
        baseline_concepts: of the training data, at most, that linear baselines are fitted to.
        env: this process among the others of the evaluation; rank 0 writes and prints.

    Returns:
        The contents of evaluation.json.

    Raises:
        InputError: with every mistake: no checkpoint; a dataset that is missing, of another encoder or without targets;
            a decoder or language model that cannot be loaded; a file that cannot be written.
    """
    errors = Collector()
    for option, path in (("--json", json_path), ("--figure", figure)):
        if path is not None and (problem := output_file_error(option, path)) is not None:
            errors.errors.append(problem)
    if samples < 1:
        errors.errors.append(f"--samples: {samples} is below 1")
    if baseline_concepts < 1:
        errors.errors.append(f"--baseline-concepts: {baseline_concepts} is below 1")
    with errors:
        source = find_model(run_dir, step)
        task = open_task(source, dataset)
    errors.raise_if_any()
    question = _question(source, task, causal_lm, decoder, samples, baseline_concepts)
    with Ranks(env) as ranks:
        result = ranks.from_first(_read_previous(source.path / FILE, question))
        if result is not None and not result["decoded"]:
            # The decoder was unavailable then, for example because its hub was down; it may be available now.
            available = load_text_metrics(task.validation, decoder, None, ranks.device).decoder is not None
            result = None if all(ranks.gather(available)) else result
        if result is not None and ranks.rank == 0:
            print(f"{source.path / FILE}: already evaluated at step {source.step}")
        if result is None:
            text_metrics = load_text_metrics(task.validation, decoder, causal_lm, ranks.device).agree(ranks)
            measured = measure(source.load(), task, ranks, text_metrics, samples, baseline_concepts)
            result = {**question, "dataset": task.validation_path, **measured}
        if ranks.rank == 0:
            title = str(source.path) if source.step is None else f"{source.path} at step {source.step}"
            is_default = dataset is None and step is None
            files = _write(source.path if is_default else None, title, result, json_path, figure)
            print_tables(title, result)
            print(f"All metrics: {files}" if files else "All metrics: use --json FILE to keep them")
            if source.step is not None:
                print(f"curves: tensorboard --logdir {source.path / 'tensorboard'}")
    return result


def _question(
    source: ModelSource,
    task: EvaluationTask,
    causal_lm: str | None,
    decoder: str | None,
    samples: int,
    baseline_concepts: int,
) -> dict[str, Any]:
    """Everything that the metrics depend on; arguments as of `evaluate`."""
    return {
        "format_version": VERSION,
        "step": source.step,
        "checkpoint": source.checksum(),
        "validation": task.validation.fingerprint,
        "training": [
            [each.fingerprint, weighted.weight] for each, weighted in zip(task.training, task.weights, strict=True)
        ],
        "rows": [task.data.row_length, task.data.max_segment],
        "causal_lm": _identity(causal_lm),
        "decoder": _identity(decoder or decoder_name(task.validation.info.encoder)),
        "samples": samples,
        "baseline_concepts": baseline_concepts,
    }


def _identity(model: str | None) -> str | None:
    """A model's name; for a folder with a hash that changes if one of its files does."""
    if model is None or not Path(model).is_dir():
        return model
    files = sorted(path for path in Path(model).rglob("*") if path.is_file())
    marks = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return f"{model} ({hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]})"


def _read_previous(path: Path, question: dict[str, Any]) -> dict[str, Any] | None:
    """The evaluation on disk, if it answers the same question and no concept was missing."""
    previous = read_object(path, default={})
    same = all(previous.get(key) == value for key, value in question.items())
    return previous if same and not previous["missing_concepts"] else None


def _write(run_dir: Path | None, title: str, result: dict[str, Any], json_path: str | None, figure: str | None) -> str:
    """Write the run's files, if `run_dir` is given, and the files that the user asked for; returns their paths."""
    jsons = [*([("RUN", str(run_dir / FILE))] if run_dir else []), *([("--json", json_path)] if json_path else [])]
    pictures = [*([("RUN", str(run_dir / FIGURE))] if run_dir else []), *([("--figure", figure)] if figure else [])]
    text = json.dumps(result, indent=1) + "\n"
    for option, path in jsons:
        if not Path(path).exists() or Path(path).read_text(encoding="utf-8") != text:
            write_named(option, path, text)
    drawn = draw_figure(title, result) if pictures else b""
    for option, path in pictures:
        write_named(option, path, drawn)
    return ", ".join(path for _, path in [*jsons, *pictures])
