"""The interface of encoders, and what both kinds share: batches, device, arithmetic, revision of the weights.

To the device and back without waiting: an encoder's `embed` only starts the computation, `PendingBatch.result` waits.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lcm_ds.config import EncoderConfig
from lcm_ds.errors import InputError, first_line
from lcm_ds.files import sha256_of
from lcm_ds.hub import work_offline_without
from lcm_ds.matmul import cpu_has_bf16

# Enough for the matrix products of the device to run at their full speed, little enough that few texts are padded (and
# that a layer's values stay in a core's cache).
TOKENS_PER_BATCH = {"cuda": 32_768, "cpu": 1_024}


@dataclass(frozen=True)
class TokenBatch:
    """Texts that an encoder embeds at once."""

    rows: Sequence[int] | np.ndarray  # which of the texts they are
    inputs: dict[str, Any]  # what `embed` takes
    tokens: int  # of the texts
    padded_tokens: int  # padding included


class Tokenizer(Protocol):
    """`Encoder.tokenize` without the encoder: pickled, it works in other processes."""

    def __call__(self, texts: list[str], languages: list[str] | None = None) -> list[TokenBatch]:
        """Batches of texts of similar length, each text in one of them; `languages` as in `Encoder.tokenize`."""


class Encoder(Protocol):
    """Turns sentences into concepts; a sentence's concept does not depend on its batch, to rounding.

    The batches of given texts are always the same. So are their concepts, to the last bit, on one kind of device and on
    a CPU with one number of threads: with another, AMX sums bf16 products in another order.

    Two attributes are optional. `batch_tokenizer`, a `Tokenizer`: `prepare` calls it instead of `tokenize`, in the
    processes that read and split; without it, or if it cannot be pickled or is of a class of the main module,
    `tokenize` is called in a thread. `device`, a torch.device, is where `embed`
    computes: on a GPU its time is measured there.
    """

    name: str  # of the kind, as in the config
    model: str  # the hub id or folder, as in the config
    revision: str | None  # the hub's commit, or "sha256:…" of a folder's weights
    embed_dim: int

    def tokenize(self, texts: list[str], languages: list[str] | None = None) -> list[TokenBatch]:
        """Batches of texts of similar length, each text in one of them; the device is not used.

        languages: of the texts, codes of SONAR; only given for SONAR and sources of several languages.
        """

    def embed(self, batch: TokenBatch) -> np.ndarray | Tensor:
        """Concepts of the batch's texts, float32 [len(batch.rows), embed_dim].

        A tensor on a GPU may still be being computed: the next batch is then started before this one is waited for.
        """

    def encode(self, texts: list[str], languages: list[str] | None = None) -> np.ndarray:
        """Concepts of texts, float32 [len(texts), embed_dim], in the order of the texts; `languages` as above."""

    def describe(self) -> dict[str, Any]:
        """Everything that determines a concept, under the keys of EncoderConfig, for dataset.json."""


class PendingBatch:
    """A batch on the device: started when it is constructed, and `result` waits for its concepts.

    They are copied into page-locked memory behind the computation, so that the host waits nowhere else.

    Args:
        encoder: Whose `embed` computes them.
        batch: Its texts.
        before: The one started before it, if any.
    """

    def __init__(self, encoder: Encoder, batch: TokenBatch, before: PendingBatch | None = None) -> None:
        self.batch = batch
        self.seconds = 0.0  # of the device; known when the result is
        self.waited = 0.0  # seconds of the device between the one before and it; known when the result is
        device: torch.device | None = getattr(encoder, "device", None)
        self._before: torch.cuda.Event | float | None = None if before is None else before._end
        self._start = _now(device)
        concepts = encoder.embed(batch)
        if isinstance(concepts, Tensor):
            device, concepts = concepts.device, _to_host(concepts)
        self._concepts = concepts
        self._end: torch.cuda.Event | float = _now(device)

    def result(self) -> np.ndarray:
        """The concepts, float32 [len(batch.rows), embed_dim]."""
        if not isinstance(self._end, float):
            self._end.synchronize()
        self.seconds = _between(self._start, self._end)
        if self._before is not None:
            self.waited = _between(self._before, self._start)
        return self._concepts.numpy() if isinstance(self._concepts, Tensor) else self._concepts


def _now(device: torch.device | None) -> torch.cuda.Event | float:
    """An event of a GPU's stream behind everything that was started on it; for another device the time."""
    if device is None or device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Seconds; 0 if they are of different clocks, as if an encoder on a GPU has no `device`."""
    if isinstance(start, float) or isinstance(end, float):
        return end - start if isinstance(start, float) and isinstance(end, float) else 0.0
    return start.elapsed_time(end) / 1000


def embeddings(encoder: Encoder, batches: Iterable[TokenBatch]) -> Iterator[PendingBatch]:
    """Batches in their order, started, each handed out once the next one was started."""
    previous: PendingBatch | None = None
    for batch in batches:
        current = PendingBatch(encoder, batch, previous)
        if previous is not None:
            yield previous
        previous = current
    if previous is not None:
        yield previous


def encode(encoder: Encoder, texts: list[str], languages: list[str] | None = None) -> np.ndarray:
    """Concepts of texts, float32 [len(texts), embed_dim], in the order of the texts, batch by batch.

    Args:
        encoder: Makes them.
        texts: To encode.
        languages: Of the texts, for SONAR; by default all have the encoder's.
    """
    concepts = np.empty((len(texts), encoder.embed_dim), np.float32)
    batches = encoder.tokenize(texts) if languages is None else encoder.tokenize(texts, languages)
    for embedding in embeddings(encoder, batches):
        concepts[embedding.batch.rows] = embedding.result()
    return concepts


def in_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices of texts, given their lengths in tokens, in batches of at most `tokens_per_batch`, padding included.

    The longest come first, so that a batch that is too large for the device fails at once. A text that exceeds the
    limit is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = []
    while order:
        size = max(1, tokens_per_batch // max(1, lengths[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches


def to_device(batch: TokenBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A batch's token ids, int64 [n, length], and bool [n, length] of those that are not padding, None if all are.

    From page-locked memory, so that the host does not wait for a GPU.
    """
    ids = _to(batch.inputs["input_ids"], device).long()
    if "lengths" not in batch.inputs:
        return ids, None
    return ids, torch.arange(ids.shape[1], device=device) < _to(batch.inputs["lengths"], device).unsqueeze(1)


def pair_mask(mask: Tensor) -> Tensor:
    """bool [n, 1, length, length]: for each query, the keys that are not padding; of `mask`, bool [n, length].

    transformers takes it as it is. Of a mask [n, length] it asks whether all of it is True, and waits for the device.
    """
    return mask.unsqueeze(1).unsqueeze(1).expand(-1, 1, mask.shape[1], -1)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    locked = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(locked, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a tensor on a GPU it is page-locked, and not complete before the stream has come to it."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def resolve_device(device: str | None) -> torch.device:
    """The device by its name; the first CUDA device, or else the CPU, by default."""
    try:
        resolved = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"device: {device!r} is no device of torch, such as cpu, cuda or cuda:1") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return resolved


def resolve_tokens_per_batch(config: EncoderConfig, device: torch.device) -> int:
    """The size of a batch: from the config, or what suits the kind of device."""
    return config.tokens_per_batch or TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cpu"])


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type of the arithmetic: "auto" is half precision if the device multiplies it natively, else float32.

    float16 on GPUs, which keeps three bits more than bfloat16 and which SONAR was trained in; bfloat16 on a CPU that
    has it (there about twice the speed of float32), because most of these emulate float16.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def compute_in(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Make a model compute in `dtype`; with bfloat16, only in its matrix products.

    Sums and norms then stay float32, at no measurable cost. Rounded to the eight bits of bfloat16
    layer after layer, they take the concepts of short sentences, the means of few tokens, below a cosine of 0.9999.
    """
    if dtype != torch.bfloat16:
        model.to(dtype)
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)
    model.forward = torch.autocast(device.type, dtype)(model.forward)


def check_revision(model: str, revision: str | None, commit: str | None) -> str | None:
    """The revision of a loaded model's weights: the hub's `commit`, or a checksum if `model` is a folder.

    Raises InputError if `revision` is the checksum of other weights.
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
    """The hub's commit that a model of transformers was loaded from; None if it came from a folder."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


class UnreachableModel(InputError):
    """A model that cannot be loaded."""


def unreachable(model: str, error: Exception) -> UnreachableModel:
    """The error for a model that cannot be loaded."""
    reason = work_offline_without(model) or first_line(error).removesuffix(".")
    return UnreachableModel(
        f"model {model!r} is neither a folder with a model of this kind nor on a hub that can be reached: {reason}"
    )
