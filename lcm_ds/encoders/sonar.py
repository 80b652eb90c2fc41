"""SONAR through transformers: sentences → concepts, and concepts → sentences.

SONAR's text encoder is NLLB's (M2M100), its output averaged over all tokens, the language's and the end's included; its
decoder is NLLB's again, attending only to that vector (https://arxiv.org/abs/2308.11466). Concepts are in raw
space.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from lcm_ds.config import EncoderConfig
from lcm_ds.encoders.base import (
    TokenBatch,
    check_revision,
    commit_of,
    compute_in,
    encode,
    pair_mask,
    resolve_device,
    resolve_dtype,
    resolve_tokens_per_batch,
    to_device,
    unreachable,
)
from lcm_ds.encoders.tokenizer import BatchTokenizer, standalone
from lcm_ds.errors import InputError
from lcm_ds.hub import work_offline_without
from lcm_ds.languages import sonar_code
from lcm_ds.terminal import silence_transformers

_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
PIECES = "sentencepiece.bpe.model"
# Conversions of the hub hold M2M100Encoder's weights under other names: those of M2M100EncoderModel, which transformers
# never took in (its pull request 29646), inside `encoder`, and the embedding as `shared`.
_NESTED = {"M2M100EncoderModel": {r"^shared\.": "embed_tokens.", r"^encoder\.": ""}}


class SonarEncoder:
    """SONAR's text encoder from any hub id or folder, such as cointegrated/SONAR_200_text_encoder.

    A text is encoded as `language … </s>`, truncated to `max_tokens` tokens, these two included.
    """

    name = "sonar"

    def __init__(self, config: EncoderConfig) -> None:
        from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

        self.config = config
        self.model = config.model
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._model = _load(M2M100Encoder, config.model, config.revision, torch.float32, _NESTED)
        compute_in(self._model, self.dtype, self.device)
        self._model.to(self.device)
        self.revision = check_revision(config.model, config.revision, commit_of(self._model))
        self.embed_dim: int = self._model.config.d_model
        self.max_tokens = min(config.max_tokens, self._model.config.max_position_embeddings)
        tokenizer = _load_tokenizer(config.model, config.revision, self._model.config.vocab_size, config.tokenizer)
        check_language(tokenizer, config.language, "encoder.language")
        tokenizer.src_lang = config.language
        self.batch_tokenizer = BatchTokenizer(
            standalone(tokenizer, self.max_tokens),
            self.max_tokens,
            resolve_tokens_per_batch(config, self.device),
            self._model.config.pad_token_id,
            _languages(tokenizer),
        )
        self._run = torch.compile(self._model, dynamic=True) if config.compile else self._model

    def tokenize(self, texts: list[str], languages: list[str] | None = None) -> list[TokenBatch]:
        """Texts as batches of token ids; texts longer than `max_tokens` are truncated.

        languages: of the texts, by default the config's. Raises ValueError for one that the model does not know.
        """
        return self.batch_tokenizer(texts, languages)

    @torch.inference_mode()
    def embed(self, batch: TokenBatch) -> Tensor:
        """Concepts of a batch, float32 [n, embed_dim], in raw space, on the device."""
        return embed(self._run, *to_device(batch, self.device))

    def encode(self, texts: list[str], languages: list[str] | None = None) -> np.ndarray:
        """Concepts of texts, float32 [len(texts), embed_dim], in the order of the texts; `languages` as above."""
        return encode(self, texts, languages)

    def describe(self) -> dict[str, Any]:
        """For dataset.json."""
        return {
            "name": self.name,
            "model": self.model,
            "revision": self.revision,
            "language": self.config.language,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_tokens": self.max_tokens,
            "embed_dim": self.embed_dim,
            **({} if self.config.tokenizer is None else {"tokenizer": self.config.tokenizer}),
        }


class SonarDecoder:
    """SONAR's text decoder from any hub id or folder, such as raxtemur/SONAR_200_text_decoder.

    `language` is the NLLB code of the language to decode into, unless `decode` gets another; the language that the
    concepts were encoded from does not matter. Raises InputError as `load_encoder` does.
    """

    def __init__(
        self,
        model: str,
        language: str = "eng_Latn",
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 16,
    ) -> None:
        from transformers import M2M100ForConditionalGeneration

        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.batch_size = batch_size
        self._model = _load(M2M100ForConditionalGeneration, model, revision, self.dtype).to(self.device)
        self.embed_dim: int = self._model.config.d_model
        self._tokenizer = _load_tokenizer(model, revision, self._model.config.vocab_size)
        self._language_id = self.language_id(language)

    def language_id(self, language: str) -> int:
        """The token that selects a language. Raises InputError for one that the model does not know."""
        return check_language(self._tokenizer, language, "language")

    @torch.inference_mode()
    def decode(
        self, concepts: np.ndarray, beams: int = 5, max_new_tokens: int = 128, language: str | None = None
    ) -> list[str]:
        """The sentences of concepts [n, embed_dim] in raw space, by beam search.

        Raises InputError for a language that the model does not know.
        """
        language_id = self._language_id if language is None else self.language_id(language)
        if concepts.ndim != 2 or concepts.shape[1] != self.embed_dim:
            raise ValueError(f"concepts have to be [n, {self.embed_dim}], not {list(concepts.shape)}")
        sentences: list[str] = []
        for start in range(0, len(concepts), self.batch_size):
            batch = np.ascontiguousarray(concepts[start : start + self.batch_size], np.float32)
            tokens = self._generate(torch.from_numpy(batch), beams, max_new_tokens, language_id)
            sentences += self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return sentences

    def _generate(self, concepts: Tensor, beams: int, max_new_tokens: int, language: int) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        # Each concept takes the place of an encoder's output for one token. Beam search changes the BaseModelOutput in
        # place, so every call gets a new one.
        hidden = concepts.to(self.device, self.dtype)[:, None]
        return self._model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=torch.ones(hidden.shape[:2], dtype=torch.long, device=self.device),
            decoder_start_token_id=2,  # </s>, as NLLB was trained
            forced_bos_token_id=language,
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )


def embed(model: Any, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Concepts [n, embed_dim], float32: the mean of the outputs over all tokens that are not padding.

    Args:
        model: SONAR's encoder.
        input_ids: int64 [n, length].
        mask: bool [n, length], True for tokens; None if nothing is padded: attention then takes faster kernels.

    Returns:
        The concepts.
    """
    pairs = None if mask is None else pair_mask(mask)
    hidden = model(input_ids=input_ids, attention_mask=pairs).last_hidden_state.float()
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.to(hidden.dtype)
    return torch.einsum("nld,nl->nd", hidden, weights) / weights.sum(dim=1, keepdim=True)


def check_language(tokenizer: Any, language: str, key: str) -> int:
    """The token id of an NLLB language code; an unknown one, which the tokenizer would take for <unk>, is refused."""
    known = _languages(tokenizer)
    if language not in known:
        meant = [code for code in (sonar_code(language),) if code in known]
        close = (
            meant or [code for code in known if code.startswith(language)] or difflib.get_close_matches(language, known)
        )
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"{key}: {language!r} is no language code of this model (NLLB's look like eng_Latn){hint}")
    return known[language]


def _languages(tokenizer: Any) -> dict[str, int]:
    """The token ids of the languages that a tokenizer has, by NLLB's codes."""
    return {token: id for token, id in tokenizer.get_added_vocab().items() if _LANGUAGE.fullmatch(token)}


def _load(
    kind: Any, model: str, revision: str | None, dtype: torch.dtype, nested: Mapping[str, Mapping[str, str]] = {}
) -> Any:
    """A model of transformers in evaluation mode, all its weights read from the files.

    transformers fills missing weights with random values and continues; here they are an error.

    Args:
        kind: The class of transformers.
        model: A hub id or a folder.
        revision: Of the hub.
        dtype: Of the weights in memory.
        nested: By the architecture that the model's config names: patterns of its weights' names, and what replaces
            them.

    Returns:
        The model.

    Raises:
        InputError: It is missing or another kind of model.
    """
    work_offline_without(model)
    try:
        with silence_transformers():
            config = kind.config_class.from_pretrained(model, revision=_hub(model, revision))
            mapping = next((dict(nested[name]) for name in config.architectures or () if name in nested), None)
            loaded, report = kind.from_pretrained(
                model, revision=_hub(model, revision), dtype=dtype, output_loading_info=True, key_mapping=mapping
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unreachable(model, error) from None
    missing = [*report["missing_keys"], *report["mismatched_keys"]]
    if missing:
        lacks = f"it lacks {len(missing)} weights, such as {min(map(str, missing))}"
        raise InputError(f"model {model!r} is no {kind.__name__}: {lacks}")
    return loaded.eval()


def _load_tokenizer(model: str, revision: str | None, vocab_size: int, named: str | None = None) -> Any:
    """A model's tokenizer; one with only language codes, which transformers makes if files are missing, is refused.

    Args:
        model: The model's hub id or folder.
        revision: Of the model.
        vocab_size: The tokens that the model knows.
        named: The hub id or folder of the tokenizer; default: the model's own.

    Returns:
        The tokenizer.

    Raises:
        InputError: It cannot be loaded, or has another vocabulary.
    """
    from transformers import NllbTokenizer

    origin, revision = (model, revision) if named is None else (named, None)
    work_offline_without(origin)
    try:
        tokenizer = NllbTokenizer.from_pretrained(origin, revision=_hub(origin, revision), legacy_behaviour=False)
        if not _languages(tokenizer) and (pieces := _pieces(origin, revision)) is not None:
            tokenizer = tokenizer_of_pieces(pieces)
    except (OSError, ValueError, TypeError) as error:
        raise unreachable(origin, error) from None
    if not 0.9 * vocab_size <= len(tokenizer) <= vocab_size:  # models leave a few ids unused
        raise InputError(
            f"model {model!r} knows {vocab_size} tokens, its tokenizer {len(tokenizer)}: files are missing, or another "
            f"one belongs to it: encoder.tokenizer, for SONAR facebook/nllb-200-distilled-600M"
        )
    return tokenizer


def _pieces(model: str, revision: str | None) -> str | None:
    """The file of a model's sentencepiece vocabulary, None if it has none.

    Of a model that has no other files of a tokenizer, transformers (5.23.0) makes one without languages, which takes
    each of them for <unk>.
    """
    from transformers.utils import cached_file

    found: str | None = cached_file(
        model, PIECES, revision=_hub(model, revision), _raise_exceptions_for_missing_entries=False
    )
    return found


def tokenizer_of_pieces(path: str) -> Any:
    """NLLB's tokenizer from its sentencepiece model, with its languages. Raises what the libraries raise."""
    from transformers import NllbTokenizer
    from transformers.convert_slow_tokenizer import NllbConverter, SentencePieceExtractor

    extracted: Any = SentencePieceExtractor(path).extract(NllbTokenizer.model)
    pieces = NllbConverter.convert_from_spm(**extracted)
    # Tokens that transformers would add itself, in NLLB's order: <mask> is the last.
    for token in (*nllb_languages(), "<mask>"):
        pieces["vocab"].setdefault(token, len(pieces["vocab"]))
    return NllbTokenizer(**{**pieces, "additional_special_tokens": None, "legacy_behaviour": False})


def nllb_languages() -> list[str]:
    """The codes of NLLB's languages in the order of its vocabulary, as in Meta's SONAR cards."""
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    return list(FAIRSEQ_LANGUAGE_CODES)


def _hub(model: str, revision: str | None) -> str:
    """The revision to ask the hub for; a folder has none."""
    return "main" if revision is None or Path(model).is_dir() else revision
