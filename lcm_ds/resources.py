"""The files that come with lcm-ds, configs/, ds_configs/ and launch/, found in a checkout and in an installed wheel.

A file of one's own at the same relative path wins; where there is none, the one that came with lcm-ds serves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from lcm_ds.errors import InputError, nearest
from lcm_ds.files import write_whole

FOLDERS = ("configs", "ds_configs", "launch")
LONGEST = 80  # characters of a description that stays as it is
_PACKAGE = Path(__file__).parent
# A wheel has the folders inside the package (setup.py); in a checkout, and what is installed from it as editable, they
# lie beside it.
ROOT = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent


@cache
def names() -> tuple[str, ...]:
    """Relative paths of all files that come with lcm-ds, such as `configs/train/quickstart.yaml`, sorted."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in files if not path.name.startswith(".")))


def find(path: str | Path) -> Path | None:
    """The file at `path`, seen from the current folder; else the one that came with lcm-ds; None where neither is."""
    path = Path(path)
    if path.is_file():
        return path
    return ROOT / path if path.as_posix() in names() else None


def description(name: str) -> str:
    """What a file that came with lcm-ds is for: how its first comment begins, or what a DeepSpeed JSON sets."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".json"):
        return _settings(json.loads(text))
    lines = [line for line in text.splitlines() if not line.startswith("#!")]
    comment = "".join(line.removeprefix("#") for line in takewhile(lambda line: line.startswith("# "), lines))
    sentence = re.split(r"[.;](?: |$)", comment.strip(), maxsplit=1)[0]
    # A long one up to the list or the remark that it leads into.
    return sentence if len(sentence) <= LONGEST else re.split(r": | \(", sentence, maxsplit=1)[0]


def _settings(mapping: dict[str, Any]) -> str:
    """A DeepSpeed JSON in a few words."""
    zero = mapping.get("zero_optimization", {})
    said = [f"ZeRO {zero.get('stage', 0)}", next((dtype for dtype in ("bf16", "fp16") if dtype in mapping), "fp32")]
    optimizer = mapping.get("optimizer", {}).get("type", "AdamW")
    said += [optimizer] if optimizer != "AdamW" else []
    for key, what in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        said += [f"{what} on {zero[key]['device']}"] if key in zero else []
    said += ["quantized communication"] if zero.get("zero_quantized_weights") else []
    return ", ".join(said)


def missing_file(path: str | Path) -> str:
    """The line about a file that is neither here nor among those that come with lcm-ds."""
    others = nearest(Path(path).as_posix(), names(), "; `lcm-ds configs` lists those that come with lcm-ds")
    return f"{path}: there is no such file{others}"


def copy(chosen: Sequence[str], destination: str | Path | None = None) -> list[Path]:
    """Copy files that came with lcm-ds; returns where to.

    Several, and one without a destination, go to their relative path below the destination (default: the current
    folder), where they win over what they are copies of. One alone goes into a destination that is a folder, or
    becomes the file of that name. Raises InputError, before anything is copied, for a name that is not among `names()`
    and for every file that is there already.
    """
    if len(chosen) == 1 and destination is not None:
        into = str(destination).endswith("/") or Path(destination).is_dir()
        pairs = {chosen[0]: Path(destination, Path(chosen[0]).name) if into else Path(destination)}
    else:
        pairs = {name: Path(destination or ".", name) for name in chosen}
    errors = [missing_file(name) for name in chosen if name not in names()]
    errors += [f"{path}: is there already, and is not overwritten" for path in pairs.values() if path.exists()]
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
