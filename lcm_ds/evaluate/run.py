"""`lcm-ds evaluate`: a model against its baselines, on the same targets; by one process or by many together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lcm_ds.data.format import Dataset
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.encoders.from_dataset import decoder_name
from lcm_ds.errors import InputError
from lcm_ds.evaluate.compute import measure
from lcm_ds.evaluate.report import draw_figure, print_tables
from lcm_ds.evaluate.subject import Subject, find_subject
from lcm_ds.evaluate.text_metrics import load_words
from lcm_ds.files import output_file_error, read_object, write_named
from lcm_ds.metrics import VERSION

FILE, FIGURE = "evaluation.json", "evaluation.png"
SAMPLES = 256  # targets that are decoded


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
    place: DistEnv | None = None,
) -> dict[str, Any]:
    """Measure a run's newest checkpoint, or that of `step`, on its validation data or on `dataset`; print the tables.

    run_dir: may be an exported Hugging Face folder, which needs a dataset. causal_lm, decoder: hub ids or folders, for
    the figures that need text, told of `samples` targets. place: this process among others that do the same, each its
    share; rank 0 alone writes and prints.

    Returns what RUN/evaluation.json holds (written, with evaluation.png, for the run's own validation dataset; where it
    is there already for this very question, it is printed again). Raises InputError for a run without a checkpoint, a
    dataset that is missing, of another encoder or without targets, a decoder or language model that cannot be loaded,
    and where json_path or figure cannot be written.
    """
    errors = [
        wrong
        for option, path in (("--json", json_path), ("--figure", figure))
        if path is not None and (wrong := output_file_error(option, path)) is not None
    ]
    if samples < 1:
        errors.append(f"--samples: {samples} is below 1")
    # All that can be wrong before the work, not after it.
    subject: Subject | None = None
    try:
        subject = find_subject(run_dir, dataset, step)
        training, validation = subject.open()
    except InputError as error:
        errors += error.errors
    if errors or subject is None:
        raise InputError(errors)
    question = _question(subject, training, validation, causal_lm, decoder, samples)
    own = dataset is None and step is None
    with Ranks(place) as ranks:
        found = ranks.from_first(_there_already(subject.path / FILE, question))
        if found is not None and not found["decoded"]:
            # What was missing then, as a decoder is while its hub is away, may be there now.
            there_now = load_words(validation, decoder, None, ranks.device).decoder is not None
            found = None if all(ranks.gather(there_now)) else found
        title = str(subject.path) if subject.step is None else f"{subject.path} at step {subject.step}"
        if found is not None and ranks.rank == 0:
            print(f"{subject.path / FILE}: already evaluated at step {subject.step}")
        if found is None:
            words = load_words(validation, decoder, causal_lm, ranks.device).agreed(ranks)
            figures = measure(subject.load(), subject, training, validation, ranks, words, samples)
            found = {**question, "dataset": subject.validation, **figures}
        if ranks.rank == 0:
            files = _write(subject.path if own else None, title, found, json_path, figure)
            print_tables(title, found)
            print(f"All figures: {files}" if files else "--json FILE keeps these figures")
            if subject.step is not None:
                print(f"curves: tensorboard --logdir {subject.path / 'tensorboard'}")
    return found


def _question(
    subject: Subject,
    training: list[Dataset],
    validation: Dataset,
    causal_lm: str | None,
    decoder: str | None,
    samples: int,
) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "format_version": VERSION,
        "step": subject.step,
        "checkpoint": subject.weights,
        "validation": validation.fingerprint,
        "training": [
            [each.fingerprint, source.weight] for each, source in zip(training, subject.training, strict=True)
        ],
        "rows": [subject.data.row_length, subject.data.max_segment],
        "causal_lm": _identity(causal_lm),
        "decoder": _identity(decoder or decoder_name(validation.info.encoder)),
        "samples": samples,
    }


def _identity(model: str | None) -> str | None:
    """A model's name; of a folder also what tells whether a file in it has changed since."""
    if model is None or not Path(model).is_dir():
        return model
    files = sorted(path for path in Path(model).rglob("*") if path.is_file())
    marks = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return f"{model} ({hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]})"


def _there_already(path: Path, question: dict[str, Any]) -> dict[str, Any] | None:
    """The evaluation on disk, if it answers this question and all of the data could be read for it."""
    found = read_object(path, default={})
    same = all(found.get(key) == value for key, value in question.items())
    return found if same and not found["missing_concepts"] else None


def _write(run_dir: Path | None, title: str, found: dict[str, Any], json_path: str | None, figure: str | None) -> str:
    """Write the files, each whole: those of the run, where it is given, and those that the user names.

    Returns where all figures are; nothing where they were not written.
    """
    jsons = [*([("RUN", str(run_dir / FILE))] if run_dir else []), *([("--json", json_path)] if json_path else [])]
    pictures = [*([("RUN", str(run_dir / FIGURE))] if run_dir else []), *([("--figure", figure)] if figure else [])]
    text = json.dumps(found, indent=1) + "\n"
    for option, path in jsons:
        if not Path(path).exists() or Path(path).read_text(encoding="utf-8") != text:
            write_named(option, path, text)
    drawn = draw_figure(title, found) if pictures else b""
    for option, path in pictures:
        write_named(option, path, drawn)
    return ", ".join(path for _, path in [*jsons, *pictures])
