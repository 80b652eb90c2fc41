"""Reading and checking checkpoints of Meta's fairseq2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcm_ds.errors import InputError, first_line


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights under Meta's names, and the metadata of a safetensors header.

    A .pt holds `{"model": state_dict}`, as written by fairseq2's trainer. Raises InputError for any other file.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = file.keys()
                # in a file with more than the weights, these have the prefix "model."
                chosen = [name for name in names if name.startswith("model.")] or list(names)
                return {name: file.get_tensor(name) for name in chosen}, file.metadata() or {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for other files the unpickler raises anything
        raise InputError(f"{path}: cannot be read as a checkpoint: {first_line(error)}") from None
    weights: Any = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f'{path}: has to be {{"model": state_dict}}, as Meta\'s trainer writes it')
    return weights, {}


def check_names(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: Any, kind: str) -> None:
    """Raise InputError with a line for every weight that is missing, unknown, or of another shape.

    Args:
        expected: Weights by name, of which the shapes count.
        weights: Those of the file.
        origin: The file.
        kind: The kind of model, for messages.
    """
    errors = [f"{origin}: {name} is missing" for name in expected.keys() - weights.keys()]
    errors += [f"{origin}: {name}: unknown to {kind}" for name in weights.keys() - expected.keys()]
    errors += [
        f"{origin}: {name} has shape {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if errors:
        raise InputError(sorted(errors))


def layer_count(weights: Mapping[str, Tensor]) -> int:
    """The number of layers, from the names of the weights: layers.N.…"""
    return 1 + max(int(match[1]) for match in map(re.compile(r"layers\.(\d+)\.").match, weights) if match)


def attention_heads(
    stated: int | None, header: Mapping[str, str], key: str, hidden_size: int, head_dim: int, origin: Any
) -> int:
    """The number of attention heads, which the weights do not determine.

    Args:
        stated: By the user.
        header: Metadata of the file, with the number under `key` if it is there.
        key: See `header`.
        hidden_size: Of the model.
        head_dim: By default there is a head for this many dimensions, if that divides `hidden_size`.
        origin: The file, for messages.
    """
    default = hidden_size // head_dim if hidden_size % head_dim == 0 else None
    heads = header_number(header, key, int, default, origin) if stated is None else stated
    if heads is None:
        raise InputError(
            f"{origin}: --heads: is needed: the number of heads of hidden size {hidden_size} is not in the file"
        )
    return heads


def header_number(header: Mapping[str, str], key: str, kind: type, default: Any, origin: Any) -> Any:
    """The value of `key` in the header of the file `origin`, as an int or float (`kind`); `default` if missing."""
    try:
        return kind(header[key]) if key in header else default
    except ValueError:
        raise InputError(f"{origin}: {key}: {header[key]!r} in the header is not a number") from None
