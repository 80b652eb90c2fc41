"""A run's model as a Hugging Face folder: config, safetensors with the normaliser, and a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from lcm_ds.checkpoint.format import Checkpoint, find, load_model
from lcm_ds.config import TrainConfig
from lcm_ds.data.concepts import CONCEPTS, ConceptInfo
from lcm_ds.data.format import Dataset, open_dataset
from lcm_ds.data.remote.cache import Cache
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import check_new, read_object, sha256_of
from lcm_ds.metrics import EVALUATION, LOGGED, VERSION
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.pretrained import MAX_SHARD_SIZE, write_folder

CARD = """\
---
library_name: lcm-ds
tags:
- large-concept-model
- sentence-embeddings
---

# {name}

A Base-LCM (https://arxiv.org/abs/2412.08821) of {parameters:,} parameters, trained with lcm-ds {lcm_ds}: it predicts
the next concept (sentence embedding) of a text from those before it.

## Use

```python
import torch
from lcm_ds import BaseLCM

model = BaseLCM.from_pretrained("{name}").eval()
concepts = torch.zeros(1, 3, {embed_dim})  # [texts, concepts, {embed_dim}], as the encoder outputs them
next_concept = model.normalizer.denormalize(model(concepts))[:, -1]
```

From text to text: `lcm-ds generate {name} --prompt "…"`. The weights are {dtype}; the normaliser is included in
float32, as `normalizer.center` and `normalizer.scale`. `concepts.json`, if present, describes the concepts.

## Training

| | |
| --- | --- |
{rows}

## Validation

{validation}

## Licence

{licence}
"""

SONAR_LICENCE = """\
The concepts are SONAR's. Meta's SONAR weights are licensed CC-BY-NC-4.0 (non-commercial), which applies to any use of
this model with them."""
OTHER_LICENCE = "The encoder above and the texts have their own licences."
UNKNOWN_LICENCE = """\
The training dataset was not available when this card was written: see the licence of its encoder. Meta's SONAR weights
are licensed CC-BY-NC-4.0 (non-commercial)."""


def export(
    run_dir: str | Path,
    output: str | Path,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write a run's model as a Hugging Face folder; on an error, nothing is written.

    Args:
        run_dir: The run.
        output: A new or empty folder.
        step: Of the checkpoint; default: the newest.
        dtype: Of the weights: float32, bfloat16 or float16; the normaliser stays float32.
        max_shard_size: E.g. "5GB": larger weights are split into several files.

    Raises:
        InputError: There is no such run or checkpoint, `output` exists, or the size is malformed.
    """
    errors = Collector()
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|KiB|MiB|GiB)", max_shard_size):
        errors.errors.append(f"--max-shard-size {max_shard_size}: has to be an integer and a unit, e.g. 5GB")
    with errors:
        check_new(output)
    with errors:
        find(run_dir, step)
    errors.raise_if_any()
    model, config, step = load_model(run_dir, step)
    model.to(getattr(torch, dtype))
    datasets = [_dataset_at(source.path, config) for source in config.data.train]
    infos = [dataset.info for dataset in datasets if dataset is not None]
    files = {"README.md": _card(Path(run_dir), Path(output).name, config, step, model, datasets)}
    if infos:
        info = ConceptInfo.of(infos[0], config.data.max_segment, infos)
        files[CONCEPTS] = json.dumps(info.model_dump(), indent=2, ensure_ascii=False) + "\n"
    write_folder(model, output, files, max_shard_size)
    print(f"{output}: the model after {step} steps, {model.num_parameters():,} parameters in {dtype}")
    if not infos:
        print(f"{output}: without {CONCEPTS}, as no training dataset is available: generate will need --dataset")


def _card(
    run_dir: Path, name: str, config: TrainConfig, step: int, model: BaseLCM, datasets: list[Dataset | None]
) -> str:
    """The model card: the model, its training data and its metrics."""
    checkpoint = find(run_dir, step)
    state = checkpoint.state()
    encoder = next((dataset.info.encoder for dataset in datasets if dataset is not None), None)
    rows = {
        "steps": f"{step:,}",
        "concepts seen": f"{state['concepts']:,}",
        "rows per step": f"{config.batch.rows_per_step} of {config.data.row_length} concepts",
        "longest segment": f"{config.data.max_segment} concepts",
        "datasets": "; ".join(
            _described(source.path, source.weight, dataset)
            for source, dataset in zip(config.data.train, datasets, strict=True)
        ),
        "encoder": "unknown" if encoder is None else _encoder(encoder),
        "started from": config.model.init_from or "random weights",
        "noise on inputs": f"{config.noise_std}, in normalised space",
        "learning rate": f"{config.optim.lr}, {config.optim.schedule.name}",
        "precision": state["precision"],
        "seed": config.seed,
        "versions": ", ".join(f"{library} {version}" for library, version in state["versions"].items()),
    }
    licence = UNKNOWN_LICENCE
    if encoder is not None:
        licence = SONAR_LICENCE if encoder.get("name") == "sonar" else OTHER_LICENCE
    validation = _validation(run_dir / "metrics.jsonl", step, config)
    evaluation = _evaluation(run_dir / "evaluation.json", checkpoint)
    return CARD.format(
        name=name,
        parameters=model.num_parameters(),
        embed_dim=model.config.embed_dim,
        dtype=str(model.post_net.weight.dtype).removeprefix("torch."),
        lcm_ds=state["versions"]["lcm_ds"],
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        validation=validation if evaluation is None else f"{validation}\n\n{evaluation}",
        licence=licence,
    )


def _dataset_at(path: str, config: TrainConfig) -> Dataset | None:
    """The dataset, or None if it is no longer available, which does not prevent an export."""
    try:
        return open_dataset(path, Cache.of(config.data.cache_dir, config.data.cache_gb), checksums=False)
    except InputError:
        return None


def _described(path: str, weight: float, dataset: Dataset | None) -> str:
    if dataset is None:
        return f"{path} (weight {weight:g})"
    totals = dataset.info.totals
    return f"{path} (weight {weight:g}; {totals.documents:,} documents, {totals.concepts:,} concepts)"


def _encoder(encoder: dict[str, Any]) -> str:
    """Name, model and revision on a line."""
    return ", ".join(str(encoder[key]) for key in ("name", "model", "revision") if encoder.get(key) is not None)


def _evaluation(path: Path, checkpoint: Checkpoint) -> str | None:
    """The metrics of this checkpoint and its baselines by `lcm-ds evaluate`, as a table; None without evaluation."""
    evaluation = read_object(path, default={})
    try:
        if evaluation["format_version"] != VERSION or evaluation["checkpoint"] != sha256_of(
            checkpoint.path / "COMPLETE"
        ):
            return None
        metrics = [metric for metric in EVALUATION if metric.in_card]
        rows = [
            [name, *(_format(scores[metric.space].get(metric.key)) for metric in metrics)]
            for name, scores in evaluation["scores"].items()
        ]
    except (KeyError, TypeError, AttributeError):  # no evaluation, or one of another version
        return None
    head = ["predictor", *(f"{metric.key} ({metric.space})" for metric in metrics)]
    table = [head, ["---"] * len(head), *rows]
    return "\n".join(
        [
            f"`lcm-ds evaluate` on {evaluation['dataset']}, {evaluation['documents']:,} documents, "
            f"{evaluation['targets']:,} targets:",
            "",
            *("| " + " | ".join(row) + " |" for row in table),
            *_difference(evaluation.get("difference")),
        ]
    )


def _difference(difference: dict[str, Any] | None) -> list[str]:
    """The distance of the model to the best baseline: lines of Markdown."""
    if difference is None:
        return []
    ends = difference["interval"]
    interval = "" if ends is None else f" (95 %: {ends[0]:+.4f} to {ends[1]:+.4f})"
    return [
        "",
        f"{difference['of']} minus {difference['less']}, the best baseline: mse {difference['value']:+.4f}{interval}.",
    ]


def _format(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _validation(metrics: Path, step: int, config: TrainConfig) -> str:
    """The last validation up to `step`, as a table."""
    last: dict[str, Any] | None = None
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:  # a line truncated by a crash
            continue
        if "val_loss" in values and values["step"] <= step:
            last = values
    if last is None:
        return "This run has no validation."
    shown = [LOGGED[key] for key in ("val_loss", "val_cosine", "val_variance_ratio")]
    return "\n".join(
        [
            f"On {config.data.validation} after {last['step']:,} steps, {last['val_targets']:,} targets; MSE and "
            "variance ratio in normalised space:",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {each.label} | {last[each.key]:.4f} |" for each in shown if last.get(each.key) is not None),
        ]
    )
