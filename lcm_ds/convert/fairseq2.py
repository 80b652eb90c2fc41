"""Checkpoints that Meta's fairseq2 wrote: reading them, and telling what is wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcm_ds.errors import InputError, first_line


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights under Meta's names, and what a safetensors header says about them.

    A .pt is `{"model": state_dict}`, as fairseq2's trainer writes it. Raises InputError for anything else.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = file.keys()
                # a file may hold more than the weights, which then stand under "model."
                chosen = [name for name in names if name.startswith("model.")] or list(names)
                return {name: file.get_tensor(name) for name in chosen}, file.metadata() or {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is none makes the unpickler raise anything
        raise InputError(f"{path}: cannot be read as a checkpoint: {first_line(error)}") from None
    weights: Any = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f'{path}: has to be {{"model": state_dict}}, as Meta\'s trainer writes it')
    return weights, {}


def check_names(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: Any, kind: str) -> None:
    """Raise InputError with a line for every weight that a model of `kind` lacks, does not know, or has otherwise."""
    errors = [f"{origin}: {name} is missing" for name in expected.keys() - weights.keys()]
    errors += [f"{origin}: {name}: unknown to {kind}" for name in weights.keys() - expected.keys()]
    errors += [
        f"{origin}: {name} has shape {list(tensor.shape)}, {list(expected[name].shape)} fits the others"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if errors:
        raise InputError(sorted(errors))


def number_in(header: Mapping[str, str], key: str, kind: type, default: Any, origin: Any) -> Any:
    """What a safetensors header says under `key`, as a number; `default` where it says nothing."""
    try:
        return kind(header[key]) if key in header else default
    except ValueError:
        raise InputError(f"{origin}: {key}: {header[key]!r} in the header is not a number") from None
