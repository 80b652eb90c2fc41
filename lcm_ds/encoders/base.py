"""What an encoder is, and what both kinds share: device, arithmetic, and the name of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lcm_ds.config import EncoderConfig
from lcm_ds.errors import InputError
from lcm_ds.files import sha256_of


class Encoder(Protocol):
    """Turns sentences into concepts; the same sentence into the same concept, whatever comes with it, to rounding."""

    name: str  # of the kind, as in the config
    model: str  # the hub id or folder, as in the config
    revision: str | None  # the hub's commit, or "sha256:…" of a folder's weights
    embed_dim: int

    def encode(self, texts: list[str]) -> np.ndarray:
        """Concepts of texts, float32 [len(texts), embed_dim], in the order of the texts."""

    def describe(self) -> dict[str, Any]:
        """For dataset.json; with the keys of EncoderConfig, it says all that determines a concept."""


def load_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that a config names, ready on its device.

    Raises InputError where the model is neither a folder nor on the hub (or the hub cannot be reached), is another kind
    of model, has other weights than `revision` says, does not know the language, or the device is not there.
    """
    if config.name == "sonar":
        from lcm_ds.encoders.sonar import SonarEncoder

        return SonarEncoder(config)
    from lcm_ds.encoders.sentence_transformer import SentenceTransformerEncoder

    return SentenceTransformerEncoder(config)


def batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of texts in batches, the longest texts first.

    Texts of as many tokens are together: little padding, and most batches have none, so that attention needs no mask.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def resolve_device(device: str | None) -> torch.device:
    """The device by its name; the first CUDA device, or else the CPU, by default."""
    try:
        resolved = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"device: {device!r} is no device of torch, such as cpu, cuda or cuda:1") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type of the arithmetic: "auto" is half precision where the device multiplies it natively, else float32.

    float16 on GPUs, which keeps three bits more than bfloat16 and which SONAR was trained in; bfloat16 on a CPU that
    has it (there 2.2 × the speed of float32, cosine to it 0.9999), for float16 is emulated there.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.float16
    native: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if native.get("avx512_bf16") or native.get("amx_bf16") else torch.float32


def check_revision(model: str, revision: str | None, commit: str | None) -> str | None:
    """What names the weights of a loaded model: the hub's `commit`, or a checksum where `model` is a folder.

    Raises InputError where `revision` is the checksum of other weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        return commit or revision
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin"):
            digest.update(sha256_of(path).encode())
    found = f"sha256:{digest.hexdigest()[:16]}"
    if revision is not None and revision.startswith("sha256:") and revision != found:
        raise InputError(f"encoder.revision: the weights in {model} are {found}, not {revision}")
    return found


def commit_of(model: Any) -> str | None:
    """The hub's commit that a model of transformers was loaded from; None where it came from a folder."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def unreachable(model: str, error: Exception) -> InputError:
    """The mistake that a model which cannot be loaded is."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(
        f"model {model!r} is neither a folder with a model of this kind nor on a hub that can be reached: {lines[0]}"
    )
