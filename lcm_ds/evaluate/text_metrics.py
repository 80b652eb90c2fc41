"""Metrics that need text: the round trip through decoder and encoder, and mutual information.

LCM paper (arXiv 2412.08821), section 2.4.1: "ℓ2-r" and "Mutual information".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import numpy as np
import torch
from torch import Tensor

from lcm_ds.data.format import DATASET, Dataset
from lcm_ds.data.shard import Shard, open_shard
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.encoders import Encoder
from lcm_ds.encoders.base import unreachable
from lcm_ds.encoders.from_dataset import decoder_name, decoder_of, encoder_of
from lcm_ds.encoders.sonar import SonarDecoder
from lcm_ds.errors import Collector, InputError
from lcm_ds.evaluate.target_sample import TargetSample
from lcm_ds.hub import work_offline_without
from lcm_ds.metrics import l2, mutual_information
from lcm_ds.terminal import silence_transformers

CONTEXT_SENTENCES = 10  # for mutual information: the paper's k
BATCH = 16  # texts per forward pass of the language model
ROUND_TRIP, MI = "l2_round_trip", "mi"


class CausalLM:
    """A causal language model of transformers: log-probabilities of sentences.

    model: a hub id or folder. Raises InputError if it cannot be loaded.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        work_offline_without(model)
        try:
            with silence_transformers():
                self._tokenizer = AutoTokenizer.from_pretrained(model)
                self._model = AutoModelForCausalLM.from_pretrained(model).eval().to(device)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--causal-lm: {mistake}" for mistake in unreachable(model, error).errors) from None
        self.device = device
        self.max_length = int(getattr(self._model.config, "max_position_embeddings", 1024))

    def mutual_information(self, contexts: Sequence[Sequence[str]], sentences: Sequence[str]) -> Tensor:
        """Mutual information of each sentence with the sentences before it: fp64 [n]; NaN without tokens.

        With and without context a newline precedes the sentence, so that its first token has a probability as well.
        """
        newline = self._ids("\n")
        texts = [self._ids(sentence)[: self.max_length // 2] for sentence in sentences]
        heads = []
        for context, text in zip(contexts, texts, strict=True):
            room = self.max_length - len(newline) - len(text)
            heads.append([*(self._ids(" ".join(context))[-room:] if room > 0 else []), *newline])
        conditional = self._log_probabilities(heads, texts)
        unconditional = self._log_probabilities([newline] * len(texts), texts)
        lengths = torch.tensor([len(text) for text in texts])
        return torch.where(lengths > 0, mutual_information(conditional, unconditional, lengths), torch.nan)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def _log_probabilities(self, heads: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Tensor:
        """Log-probability of each text's token ids after those of its head: fp64 [n]."""
        result = torch.zeros(len(texts), dtype=torch.float64)
        order = sorted(range(len(texts)), key=lambda i: len(heads[i]) + len(texts[i]))
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            sequences = [torch.tensor([*heads[i], *texts[i]]) for i in batch]
            # Padded on the right, which a causal model does not see.
            ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.device)
            logits = self._model(input_ids=ids).logits[:, :-1].float()
            log_probs = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2).double().cpu()
            for row, i in enumerate(batch):
                start = len(heads[i]) - 1
                result[i] = log_probs[row, start : start + len(texts[i])].sum()
        return result


@dataclass(frozen=True)
class TextMetrics:
    """The models that these metrics need; None for those that are not available."""

    encoder: Encoder | None
    decoder: SonarDecoder | None
    causal_lm: CausalLM | None
    notes: tuple[str, ...]  # why some metrics are missing

    def agree(self, ranks: Ranks) -> TextMetrics:
        """The same models on all ranks: no decoder if one of the ranks has none. A collective call."""
        if all(ranks.gather(self.decoder is not None)) or self.decoder is None:
            return self
        return replace(
            self, encoder=None, decoder=None, notes=(*self.notes, "ℓ2-r, MI: some processes have no decoder")
        )

    def compute(self, sample: TargetSample, validation: Dataset, ranks: Ranks) -> dict[str, dict[str, Tensor]]:
        """Compute the metrics of sampled targets; a collective call, in which each rank decodes its share.

        Args:
            sample: n targets, the same on all ranks.
            validation: the dataset that they are from.
            ranks: all of which call this.

        Returns:
            Predictor → metric → fp64 [n]. "truth" is among the predictors: the loss of a round trip of the true
            concepts, and the mutual information of the true sentences.
        """
        share = slice(ranks.rank, None, ranks.size)
        concepts = {"truth": sample.truth[share], **{name: values[share] for name, values in sample.predicted.items()}}
        sentences = self._decode(concepts)
        values: dict[str, dict[str, Tensor]] = {name: {} for name in concepts}
        if sentences is not None:
            for name, vectors in self._encode(sentences).items():
                values[name][ROUND_TRIP] = _scatter(l2(vectors, sample.truth[share]), share, len(sample))
        if self.causal_lm is not None:
            contexts, truth = sentences_of(validation, sample.document[share].tolist(), sample.position[share].tolist())
            for name, texts in {**(sentences or {}), "truth": truth}.items():
                values[name][MI] = _scatter(self.causal_lm.mutual_information(contexts, texts), share, len(sample))
        ranks.all_reduce(each for by in values.values() for each in by.values())
        return values

    def _decode(self, concepts: dict[str, Tensor]) -> dict[str, list[str]] | None:
        """A sentence for each concept; equal concepts, such as the mean's, are decoded once."""
        if self.decoder is None:
            return None
        unique, inverse = np.unique(torch.cat(list(concepts.values())).numpy(), axis=0, return_inverse=True)
        decoded = self.decoder.decode(unique)
        sentences = iter([decoded[index] for index in inverse.reshape(-1)])
        return {name: list(islice(sentences, len(vectors))) for name, vectors in concepts.items()}

    def _encode(self, sentences: dict[str, list[str]]) -> dict[str, Tensor]:
        """The concepts of sentences; equal sentences are encoded once."""
        assert self.encoder is not None
        unique = sorted({sentence for texts in sentences.values() for sentence in texts})
        index = {sentence: i for i, sentence in enumerate(unique)}
        concepts = torch.from_numpy(self.encoder.encode(unique))
        return {name: concepts[[index[sentence] for sentence in texts]] for name, texts in sentences.items()}


def _scatter(values: Tensor, share: slice, count: int) -> Tensor:
    """This rank's values at their indices among those of all ranks: fp64 [count], otherwise zeros."""
    result = torch.zeros(count, dtype=torch.float64)
    result[share] = values.double()
    return result


def load_text_metrics(
    validation: Dataset, decoder_path: str | None, causal_lm_path: str | None, device: torch.device
) -> TextMetrics:
    """Load the models for the text of a dataset's concepts.

    Args:
        validation: the dataset.
        decoder_path: hub id or folder; default: the encoder's own decoder, if it has one.
        causal_lm_path: hub id or folder; default: no language model.
        device: to load them on.

    Raises:
        InputError: if a model that the user named cannot be loaded.
    """
    described, errors, notes = validation.info.encoder, Collector(), []
    name = decoder_path or decoder_name(described)
    decoder: SonarDecoder | None = None
    encoder: Encoder | None = None
    causal_lm: CausalLM | None = None
    if name is None:
        notes.append(f"ℓ2-r, MI: no decoder is known for the encoder {described.get('model')}; --decoder names one")
    else:
        try:
            decoder = decoder_of(name, described, validation.embed_dim, str(device))
            encoder = encoder_of(described, validation.embed_dim, f"{validation.path}/{DATASET}", str(device))
        except InputError as error:
            decoder = None
            if decoder_path is not None:
                errors.errors.extend(f"--decoder: {mistake}" for mistake in error.errors)
            notes.append(f"ℓ2-r, MI: no decoder: {error}")
    if causal_lm_path is None:
        notes.append("MI: needs a language model; the paper's is --causal-lm openai-community/gpt2")
    else:
        with errors:
            causal_lm = CausalLM(causal_lm_path, device)
    errors.raise_if_any()
    return TextMetrics(encoder, decoder, causal_lm, tuple(notes))


def sentences_of(
    dataset: Dataset, documents: Sequence[int], positions: Sequence[int]
) -> tuple[list[list[str]], list[str]]:
    """Read the sentences of concepts, and the sentences before them.

    Args:
        dataset: with sentences.
        documents: indices of the concepts' documents in the dataset.
        positions: of the concepts in their documents.

    Returns:
        For each concept up to CONTEXT_SENTENCES sentences before it, and its own sentence.

    Raises:
        InputError: if the dataset has no sentences.
    """
    firsts = [0, *accumulate(shard.documents for shard in dataset.shards)]
    contexts: list[list[str]] = [[]] * len(documents)
    own = [""] * len(documents)
    opened: tuple[int, Shard] | None = None
    for i in sorted(range(len(documents)), key=documents.__getitem__):  # so that each shard is opened once
        document, position = documents[i], positions[i]
        index = bisect_right(firsts, document) - 1
        if opened is None or opened[0] != index:
            opened = index, open_shard(dataset, index)
        sentences = opened[1].meta(document - firsts[index])["sentences"]
        if not sentences:
            raise InputError(f"--causal-lm: {dataset.path}: has no sentences, which mutual information needs")
        contexts[i], own[i] = sentences[max(0, position - CONTEXT_SENTENCES) : position], sentences[position]
    return contexts, own
