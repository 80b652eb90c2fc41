"""The config of `lcm-ds adopt`: that of configs/prepare/adopt.yaml, with the options of the command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_ds.config import PrepareConfig, read_yaml, validate

_RECIPE = "configs/prepare/adopt.yaml"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".parquet", ".npy", ".npz", ".arrow", ".jsonl", ".tar")


def adoption_config(
    source: str,
    output: str,
    encoder: Mapping[str, Any] | None = None,
    like: str | None = None,
    concepts: Sequence[str] = (),
    sentences: Sequence[str] = (),
    end_of_text: str | None = None,
    source_suffix: str | None = None,
    processes: int | None = None,
    overrides: Sequence[str] = (),
) -> PrepareConfig:
    """The config of an adoption.

    Args:
        source: A file, a folder, a glob, a URL of parquet, or the id of a hub dataset.
        output: The folder for both splits.
        encoder: What made the concepts, as in dataset.json.
        like: A dataset of the same encoder, instead.
        concepts: The columns of concepts: one, or of supervised documents two.
        sentences: The columns of their sentences.
        end_of_text: The sentence whose concept is added to each document; "" for the default, None for none.
        source_suffix: The sentence whose concept is added to each supervised source, likewise.
        processes: On this host.
        overrides: key=value.

    Returns:
        The config.

    Raises:
        InputError: With a line for every invalid value.
    """
    mapping = read_yaml(_RECIPE, overrides)
    block = mapping["source"]
    if is_hub_id(source) or (block.get("config") is not None and Path(source).is_dir()):
        block["dataset"], block["paths"] = source, []
    else:
        block["paths"] = [source]
    block |= {"encoder": dict(encoder or block["encoder"]), "like": like or block.get("like")}
    block |= {"concepts_columns": list(concepts) or block["concepts_columns"]}
    block |= {"sentences_columns": list(sentences) or block["sentences_columns"]}
    mapping["output"] = output
    for key, text in (("end_of_text", end_of_text), ("source_suffix", source_suffix)):
        if text is not None:
            block["add"] = [*block["add"], key]
            mapping |= {key: text} if text else {}
    if processes is not None:
        mapping["processes"] = processes
    return validate(PrepareConfig, mapping, "adopt")


def is_hub_id(source: str) -> bool:
    """Whether this names a hub dataset: OWNER/NAME, and nothing of that name is here."""
    return bool(_HUB_ID.fullmatch(source)) and not source.endswith(_FILES) and not Path(source).parent.is_dir()
