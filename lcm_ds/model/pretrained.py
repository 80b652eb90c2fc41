"""A model as a Hugging Face folder, written atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lcm_ds.errors import InputError
from lcm_ds.files import new_folder
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.sizes import Sizes
from lcm_ds.terminal import silence_transformers

MAX_SHARD_SIZE = "5GB"


def write_folder(
    model: BaseLCM, output: str | Path, more: Mapping[str, str] | None = None, max_shard_size: str = MAX_SHARD_SIZE
) -> None:
    """Write config and safetensors (with the normaliser).

    Args:
        model: What to write.
        output: The new folder.
        more: Texts of further files, by name.
        max_shard_size: Above that the weights are split into several files with an index, as by Hugging Face.

    Raises:
        InputError: The folder exists already or cannot be written.
    """
    from lcm_ds.model import hugging_face  # transformers takes seconds to import, and a rank that trains has no need

    with new_folder(output) as folder:
        with silence_transformers():
            hugging_face.BaseLCM.of(model).save_pretrained(folder, max_shard_size=max_shard_size)
        for name, text in (more or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def read_config(folder: Path) -> Sizes:
    """The sizes of the model in such a folder. Raises InputError if its config.json cannot be read."""
    from lcm_ds.model.config import BaseLCMConfig

    try:
        config: Sizes = BaseLCMConfig.from_pretrained(folder)
        return config
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its config.json cannot be read: {str(error).splitlines()[0]}") from None


def read_folder(path: str | Path) -> BaseLCM:
    """The model in such a folder, in evaluation mode on the CPU, fp32. Raises InputError if weights are missing.

    transformers fills missing weights with random values and continues; here they are an error.
    """
    from lcm_ds.model import hugging_face

    try:
        with silence_transformers():
            loading: Any = hugging_face.BaseLCM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be loaded as a Base-LCM: {str(error).splitlines()[0]}") from None
    model: BaseLCM = loading[0].eval()
    if missing := [*loading[1]["missing_keys"], *loading[1]["mismatched_keys"]]:
        raise InputError(f"{path}: lacks {len(missing)} of the model's weights, such as {min(map(str, missing))}")
    return model
