"""A run's model as a Hugging Face folder: config, safetensors with the normaliser inside, and a card of its making."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lcm_ds.config import TrainConfig
from lcm_ds.data.cache import Cache
from lcm_ds.data.format import Dataset, open_dataset
from lcm_ds.errors import InputError
from lcm_ds.model.folder import check_new, write_folder
from lcm_ds.train.checkpoint import find, load_model

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

    import torch
    from lcm_ds.model.modeling import BaseLCM

    model = BaseLCM.from_pretrained("{name}").eval()
    concepts = torch.zeros(1, 3, {embed_dim})  # [texts, concepts, {embed_dim}], as the encoder gives them
    following = model.normalizer.denormalize(model(concepts))[:, -1]

The weights are fp32; the normaliser is among them as `normalizer.center` and `normalizer.scale`.

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


def export(run_dir: str | Path, output: str | Path, step: int | None = None) -> None:
    """Write the model of a run's newest checkpoint, or of the one of `step`, as the folder `output`.

    The folder is whole or not there. Raises InputError where there is no such run or checkpoint, or `output` is a file
    or a folder that is not empty.
    """
    check_new(output)
    model, config, step = load_model(run_dir, step)
    card = _card(Path(run_dir), Path(output).name, config, step, model.num_parameters(), model.config.embed_dim)
    write_folder(model, output, card)
    print(f"{output}: the model after {step} steps, {model.num_parameters():,} parameters")


def _card(run_dir: Path, name: str, config: TrainConfig, step: int, parameters: int, embed_dim: int) -> str:
    """README.md of the folder: what the model is, what it was trained on, and how well it does."""
    state = find(run_dir, step).state()
    datasets = [_dataset_at(source.path, config) for source in config.data.train]
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
        parameters=parameters,
        embed_dim=embed_dim,
        lcm_ds=state["versions"]["lcm_ds"],
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        validation=_validation(run_dir / "metrics.jsonl", step, config),
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
    names = {
        "val_loss": "mean squared error",
        "val_cosine": "cosine",
        "val_variance_ratio": "variance of predictions over variance of targets",
    }
    return "\n".join(
        [
            f"On {config.data.validation} after {last['step']:,} steps, in normalised space, "
            f"{last['val_targets']:,} targets:",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {last[key]:.4f} |" for key, name in names.items() if last.get(key) is not None),
        ]
    )
