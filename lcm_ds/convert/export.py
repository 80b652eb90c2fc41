"""A run's model as a Hugging Face folder: config, safetensors with the normaliser inside, and a card of its making."""

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

A Base-LCM (https://arxiv.org/abs/2412.08821) of {parameters:,} parameters, trained with lcm-ds {lcm_ds}: from the
concepts (sentence embeddings) of a text up to each of them it predicts the one that follows.

## Use

```python
import torch
from lcm_ds import BaseLCM

model = BaseLCM.from_pretrained("{name}").eval()
concepts = torch.zeros(1, 3, {embed_dim})  # [texts, concepts, {embed_dim}], as the encoder gives them
following = model.normalizer.denormalize(model(concepts))[:, -1]
```

From text to text: `lcm-ds generate {name} --prompt "…"`. The weights are {dtype}; the normaliser is among them, in
float32, as `normalizer.center` and `normalizer.scale`. `concepts.json`, where it is there, says what made the concepts.

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
The concepts are SONAR's. Meta's SONAR weights are licensed CC-BY-NC-4.0 (non-commercial); whoever uses this model with
them is bound by that."""
OTHER_LICENCE = "The encoder above has a licence of its own, and so have the texts."
UNKNOWN_LICENCE = """\
The training dataset was not at hand when this card was written: see the licence of the encoder that made it. Meta's
SONAR weights are licensed CC-BY-NC-4.0 (non-commercial)."""


def export(
    run_dir: str | Path,
    output: str | Path,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write the model of a run's newest checkpoint, or of the one of `step`, as the folder `output`.

    dtype: float32, bfloat16 or float16, of the weights; the normaliser stays float32. max_shard_size: such as "5GB",
    above which the weights are cut into several files. The folder is whole or not there. Raises InputError where there
    is no such run or checkpoint, `output` is a file or a folder that is not empty, and for a size that is none.
    """
    errors = Collector()
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|KiB|MiB|GiB)", max_shard_size):
        errors.errors.append(f"--max-shard-size {max_shard_size}: has to be a whole number and a unit, as in 5GB")
    with errors:
        check_new(output)
    with errors:
        find(run_dir, step)
    errors.raise_if_any()
    model, config, step = load_model(run_dir, step)
    model.to(getattr(torch, dtype))
    datasets = [_dataset_at(source.path, config) for source in config.data.train]
    known = next((dataset for dataset in datasets if dataset is not None), None)
    more = {"README.md": _card(Path(run_dir), Path(output).name, config, step, model, datasets)}
    if known is not None:
        mixed = [dataset.info for dataset in datasets if dataset is not None]
        info = ConceptInfo.of(known.info, config.data.max_segment, mixed)
        more[CONCEPTS] = json.dumps(info.model_dump(), indent=2, ensure_ascii=False) + "\n"
    write_folder(model, output, more, max_shard_size)
    print(f"{output}: the model after {step} steps, {model.num_parameters():,} parameters in {dtype}")
    if known is None:
        print(f"{output}: without {CONCEPTS}, for no training dataset is at hand: generate will need --dataset")


def _card(
    run_dir: Path, name: str, config: TrainConfig, step: int, model: BaseLCM, datasets: list[Dataset | None]
) -> str:
    """README.md of the folder: what the model is, what it was trained on, and how well it does."""
    checkpoint = find(run_dir, step)
    state = checkpoint.state()
    known = next((dataset for dataset in datasets if dataset is not None), None)
    rows = {
        "steps": f"{step:,}",
        "concepts seen": f"{state['concepts']:,}",
        "rows a step": f"{config.batch.rows_per_step} of {config.data.row_length} concepts",
        "longest segment": f"{config.data.max_segment} concepts",
        "datasets": "; ".join(
            _described(source.path, source.weight, dataset)
            for source, dataset in zip(config.data.train, datasets, strict=True)
        ),
        "encoder": "not known" if known is None else _encoder(known.info.encoder),
        "started from": config.model.init_from or "fresh weights",
        "noise on inputs": f"{config.noise_std}, in normalised space",
        "learning rate": f"{config.optim.lr}, {config.optim.schedule.name}",
        "precision": state["precision"],
        "seed": config.seed,
        "versions": ", ".join(f"{library} {version}" for library, version in state["versions"].items()),
    }
    if known is None:
        licence = UNKNOWN_LICENCE
    else:
        licence = SONAR_LICENCE if known.info.encoder.get("name") == "sonar" else OTHER_LICENCE
    return CARD.format(
        name=name,
        parameters=model.num_parameters(),
        embed_dim=model.config.embed_dim,
        dtype=str(model.post_net.weight.dtype).removeprefix("torch."),
        lcm_ds=state["versions"]["lcm_ds"],
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        validation="\n\n".join(
            told
            for told in (
                _validation(run_dir / "metrics.jsonl", step, config),
                _evaluation(run_dir / "evaluation.json", checkpoint),
            )
            if told is not None
        ),
        licence=licence,
    )


def _dataset_at(path: str, config: TrainConfig) -> Dataset | None:
    """The dataset, or None where it is no longer there: that keeps nobody from their weights."""
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
    """Name, model and revision in a line."""
    return ", ".join(str(encoder[key]) for key in ("name", "model", "revision") if encoder.get(key) is not None)


def _evaluation(path: Path, checkpoint: Checkpoint) -> str | None:
    """What `lcm-ds evaluate` has found of this very checkpoint, beside its baselines, as a table; None if nothing."""
    found = read_object(path, default={})
    try:
        if found["format_version"] != VERSION or found["checkpoint"] != sha256_of(checkpoint.path / "COMPLETE"):
            return None
        metrics = [metric for metric in EVALUATION if metric.in_card]
        rows = [
            [name, *(_figure(of[metric.space].get(metric.key)) for metric in metrics)]
            for name, of in found["scores"].items()
        ]
    except (KeyError, TypeError, AttributeError):  # none, or that of another version
        return None
    head = ["predictor", *(f"{metric.key} ({metric.space})" for metric in metrics)]
    table = [head, ["---"] * len(head), *rows]
    return "\n".join(
        [
            f"`lcm-ds evaluate` on {found['dataset']}, {found['documents']:,} documents, {found['targets']:,} targets:",
            "",
            *("| " + " | ".join(row) + " |" for row in table),
            *_difference(found.get("difference")),
        ]
    )


def _difference(found: dict[str, Any] | None) -> list[str]:
    """How far the model is from the best baseline: lines of Markdown."""
    if found is None:
        return []
    ends = found["interval"]
    told = "" if ends is None else f" (95 %: {ends[0]:+.4f} to {ends[1]:+.4f})"
    return ["", f"{found['of']} less {found['less']}, the best baseline: mse {found['value']:+.4f}{told}."]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _validation(metrics: Path, step: int, config: TrainConfig) -> str:
    """The last validation up to `step`, as a table."""
    last: dict[str, Any] | None = None
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:  # a line that a crash cut short
            continue
        if "val_loss" in values and values["step"] <= step:
            last = values
    if last is None:
        return "This run has not validated."
    shown = [LOGGED[key] for key in ("val_loss", "val_cosine", "val_variance_ratio")]
    return "\n".join(
        [
            f"On {config.data.validation} after {last['step']:,} steps, in normalised space, "
            f"{last['val_targets']:,} targets:",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {each.label} | {last[each.key]:.4f} |" for each in shown if last.get(each.key) is not None),
        ]
    )
