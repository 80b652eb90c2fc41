"""A model as a Hugging Face folder that is whole or not there."""

from __future__ import annotations

from pathlib import Path

from lcm_ds.files import check_new, new_folder
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.quiet import quiet

__all__ = ["check_new", "write_folder"]


def write_folder(model: BaseLCM, output: str | Path, card: str | None = None) -> None:
    """Write config, safetensors (the normaliser inside) and the card, if any, as README.md.

    Raises InputError where the folder is there already or cannot be written.
    """
    with new_folder(output) as folder:
        with quiet():
            model.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
