"""The files that ship with lcm-ds (configs/, ds_configs/, launch/), in a checkout or an installed wheel.

A user's file at the same relative path takes precedence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from lcm_ds.errors import InputError, did_you_mean
from lcm_ds.files import write_whole

FOLDERS = ("configs", "ds_configs", "launch")
LONGEST = 80  # characters of a description that is not shortened
_PACKAGE = Path(__file__).parent
# Inside the package in a wheel (see setup.py), beside it in a checkout or an editable install.
ROOT = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent


@cache
def names() -> tuple[str, ...]:
    """Sorted relative paths of all shipped files, such as `configs/train/quickstart.yaml`."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in files if not path.name.startswith(".")))


def find(path: str | Path) -> Path | None:
    """The file at `path`, relative to the current folder, or else the shipped file; None if there is neither."""
    path = Path(path)
    if path.is_file():
        return path
    return ROOT / path if path.as_posix() in names() else None


def description(name: str) -> str:
    """What a shipped file is for: the first sentence of its comment, or the settings of a DeepSpeed JSON."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".json"):
        return _settings(json.loads(text))
    lines = [line for line in text.splitlines() if not line.startswith("#!")]
    comment = "".join(line.removeprefix("#") for line in takewhile(lambda line: line.startswith("# "), lines))
    sentence = re.split(r"[.;](?: |$)", comment.strip(), maxsplit=1)[0]
    # A long sentence ends before its list or remark.
    return sentence if len(sentence) <= LONGEST else re.split(r": | \(", sentence, maxsplit=1)[0]


def _settings(mapping: dict[str, Any]) -> str:
    """Summarise a DeepSpeed JSON."""
    zero = mapping.get("zero_optimization", {})
    words = [f"ZeRO {zero.get('stage', 0)}", next((dtype for dtype in ("bf16", "fp16") if dtype in mapping), "fp32")]
    optimizer = mapping.get("optimizer", {}).get("type", "AdamW")
    words += [optimizer] if optimizer != "AdamW" else []
    for key, name in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        words += [f"{name} on {zero[key]['device']}"] if key in zero else []
    words += ["quantized communication"] if zero.get("zero_quantized_weights") else []
    return ", ".join(words)


def missing_file(path: str | Path) -> str:
    """The error for a file that neither exists nor ships with lcm-ds."""
    others = did_you_mean(Path(path).as_posix(), names(), "; `lcm-ds configs` lists the shipped ones")
    return f"{path}: no such file here or in lcm-ds{others}"


def copy(chosen: Sequence[str], destination: str | Path | None = None) -> list[Path]:
    """Copy shipped files, and return the paths of the copies.

    A single file is copied into a destination folder or to a destination file. Several files, or one without a
    destination, keep their relative paths below the destination (default: the current folder), so that the copies
    take precedence. Raises InputError, before anything is copied, for names that are not shipped and for files that
    already exist.
    """
    if len(chosen) == 1 and destination is not None:
        into = str(destination).endswith("/") or Path(destination).is_dir()
        pairs = {chosen[0]: Path(destination, Path(chosen[0]).name) if into else Path(destination)}
    else:
        pairs = {name: Path(destination or ".", name) for name in chosen}
    errors = [missing_file(name) for name in chosen if name not in names()]
    errors += [f"{path}: already exists and is not overwritten" for path in pairs.values() if path.exists()]
    if errors:
        raise InputError(errors)
    for name, path in pairs.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (ROOT / name).read_bytes())
            path.chmod((ROOT / name).stat().st_mode)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    return list(pairs.values())
