"""A model as a Hugging Face folder that is whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lcm_ds.errors import InputError
from lcm_ds.files import sync
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.quiet import quiet


def check_new(output: str | Path) -> None:
    """Raise InputError where `output` is a file, or a folder that is not empty."""
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output}: is there already; choose a new folder")


def write_folder(model: BaseLCM, output: str | Path, card: str | None = None) -> None:
    """Write config, safetensors (the normaliser inside) and the card, if any, as README.md.

    Raises InputError where the folder is there already or cannot be written.
    """
    check_new(output)
    output = Path(output)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with quiet():
            model.save_pretrained(partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, output)
        sync(output.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None
