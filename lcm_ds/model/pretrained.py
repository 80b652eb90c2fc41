"""A model as a Hugging Face folder that is whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lcm_ds.errors import InputError
from lcm_ds.files import new_folder
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.terminal import silence_transformers

MAX_SHARD_SIZE = "5GB"


def write_folder(
    model: BaseLCM, output: str | Path, more: Mapping[str, str] | None = None, max_shard_size: str = MAX_SHARD_SIZE
) -> None:
    """Write config, safetensors (the normaliser inside), and `more` files: their texts by their names.

    max_shard_size: above that the weights are cut into several files, with an index, as Hugging Face has it. Raises
    InputError where the folder is there already or cannot be written.
    """
    with new_folder(output) as folder:
        with silence_transformers():
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        for name, text in (more or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def read_folder(path: str | Path) -> BaseLCM:
    """The model in such a folder, in evaluation mode on the CPU, fp32. Raises InputError where it has not all weights.

    transformers gives weights that it does not find random values and goes on; here that is a mistake.
    """
    try:
        with silence_transformers():
            loading: Any = BaseLCM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be loaded as a Base-LCM: {str(error).splitlines()[0]}") from None
    model: BaseLCM = loading[0].eval()
    if missing := [*loading[1]["missing_keys"], *loading[1]["mismatched_keys"]]:
        raise InputError(f"{path}: lacks {len(missing)} of the model's weights, such as {min(map(str, missing))}")
    return model
