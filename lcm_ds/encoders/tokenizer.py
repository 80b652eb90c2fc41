"""Texts → batches of token ids, without the model: `prepare` does it in the processes that read and split."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from lcm_ds.encoders.base import TokenBatch, in_batches

_PROBES = ["", "It rains.", "Nobody had expected it so early in the year! " * 1000]


@dataclass(frozen=True)
class BatchTokenizer:
    """A `Tokenizer` around one of transformers or of tokenizers; texts longer than `max_tokens` are truncated.

    The inputs of its batches are `input_ids`, int32 [n, length], and `lengths`, int32 [n], if any of them is padded.
    Without a tokenizer they are `texts`, for models whose library needs these, and four characters count as a token.
    """

    tokenizer: Any
    max_tokens: int
    tokens_per_batch: int  # padding included
    padding: int = 0  # the token id
    languages: dict[str, int] | None = None  # the ids of SONAR's languages, which are the first token of each text

    def __call__(self, texts: list[str], languages: list[str] | None = None) -> list[TokenBatch]:
        """Batches of texts of similar length, each text in one of them.

        languages: of the texts, codes of SONAR; by default all have that of the tokenizer. Raises ValueError for one
        that the model does not know.
        """
        tokens = None if self.tokenizer is None or not texts else self._ids(texts)
        if languages is not None and tokens is not None:
            for ids, language in zip(tokens, languages, strict=True):
                if language not in (self.languages or {}):
                    raise ValueError(f"the encoder does not know the language {language!r}")
                ids[0] = (self.languages or {})[language]
        if tokens is None:
            lengths = [min(self.max_tokens, len(text) // 4 + 1) for text in texts]
        else:
            lengths = [len(ids) for ids in tokens]
        batches = []
        for rows in in_batches(lengths, self.tokens_per_batch):
            if tokens is None:
                inputs: dict[str, Any] = {"texts": [texts[row] for row in rows]}
            else:
                inputs = pad([tokens[row] for row in rows], self.padding)
            real, padded = sum(lengths[row] for row in rows), lengths[rows[0]] * len(rows)
            batches.append(TokenBatch(np.array(rows, np.int32), inputs, real, padded))
        return batches

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if hasattr(self.tokenizer, "encode_batch_fast"):
            return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        return _by_transformers(self.tokenizer, texts, self.max_tokens)


def standalone(tokenizer: Any, max_tokens: int) -> Any:
    """A tokenizer of transformers as one of the library tokenizers, if it is one inside and gives the same.

    That one is twice as fast, because it makes no masks and dictionaries, and a process needs no transformers for it.
    """
    # Special tokens in a text are words of it for some tokenizers (split_special_tokens), for others themselves.
    special = [f"It rains {token} today." for token in getattr(tokenizer, "all_special_tokens", ())]
    probes = [*_PROBES, *special]
    expected = _by_transformers(tokenizer, probes, max_tokens)  # which sets how it truncates
    inner: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(inner, "encode_batch_fast"):
        return tokenizer
    inner = type(inner).from_str(inner.to_str())  # its own: transformers changes the settings of the other
    return inner if [found.ids for found in inner.encode_batch_fast(probes)] == expected else tokenizer


def _by_transformers(tokenizer: Any, texts: list[str], max_tokens: int) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return ids


def pad(rows: list[list[int]], value: int) -> dict[str, np.ndarray]:
    """Token ids padded to the longest row, as inputs of a batch: int32, with the lengths if any row is shorter."""
    lengths = np.array([len(row) for row in rows], np.int32)
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, value, np.int32)
    ids[mask] = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
    return {"input_ids": ids} if mask.all() else {"input_ids": ids, "lengths": lengths}
