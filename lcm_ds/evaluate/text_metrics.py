"""Figures that need the predictions' text: the round trip through decoder and encoder, and mutual information.

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
from lcm_ds.metrics import l2, mutual_information
from lcm_ds.terminal import silence_transformers

BEFORE = 10  # sentences that mutual information is told with: the paper's k
AT_A_TIME = 16  # texts that the language model reads together
ROUND_TRIP, MI = "l2_round_trip", "mi"


class CausalLM:
    """A causal language model of transformers: log-probabilities of sentences.

    model: a hub id or folder. Raises InputError where it cannot be loaded.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            with silence_transformers():
                self._tokenizer = AutoTokenizer.from_pretrained(model)
                self._model = AutoModelForCausalLM.from_pretrained(model).eval().to(device)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--causal-lm: {mistake}" for mistake in unreachable(model, error).errors) from None
        self.device = device
        self.longest = int(getattr(self._model.config, "max_position_embeddings", 1024))

    def mutual_information(self, before: Sequence[Sequence[str]], sentences: Sequence[str]) -> Tensor:
        """MI of each sentence with those before it (see lcm_ds.metrics): fp64 [n]; NaN for one without tokens.

        In both readings a newline stands in front of the sentence, so that its first token has a probability as well.
        """
        newline = self._ids("\n")
        texts = [self._ids(sentence)[: self.longest // 2] for sentence in sentences]
        contexts = [self._ids(" ".join(some)) for some in before]
        room = [self.longest - len(newline) - len(text) for text in texts]
        heads = [
            [*(context[-most:] if most > 0 else []), *newline] for context, most in zip(contexts, room, strict=True)
        ]
        given, alone = self._log_probabilities(heads, texts), self._log_probabilities([newline] * len(texts), texts)
        lengths = torch.tensor([len(text) for text in texts])
        return torch.where(lengths > 0, mutual_information(given, alone, lengths), torch.nan)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def _log_probabilities(self, heads: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Tensor:
        """Of token ids behind others, the sum over the tokens: fp64 [n]."""
        found = torch.zeros(len(texts), dtype=torch.float64)
        order = sorted(range(len(texts)), key=lambda number: len(heads[number]) + len(texts[number]))
        for first in range(0, len(order), AT_A_TIME):
            some = order[first : first + AT_A_TIME]
            whole = [torch.tensor([*heads[number], *texts[number]]) for number in some]
            # Padded behind, which no token before it sees.
            ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True).to(self.device)
            logits = self._model(input_ids=ids).logits[:, :-1].float()
            of_next = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2).double().cpu()
            for row, number in enumerate(some):
                begin = len(heads[number]) - 1
                found[number] = of_next[row, begin : begin + len(texts[number])].sum()
        return found


@dataclass(frozen=True)
class TextMetrics:
    """What text is told with; None of each that there is not."""

    encoder: Encoder | None
    decoder: SonarDecoder | None
    causal_lm: CausalLM | None
    notes: tuple[str, ...]  # why some figures are missing

    def agreed(self, ranks: Ranks) -> TextMetrics:
        """The same on all ranks, which decode together: without a decoder if one of them has none. All call this."""
        if all(ranks.gather(self.decoder is not None)) or self.decoder is None:
            return self
        return replace(
            self, encoder=None, decoder=None, notes=(*self.notes, "ℓ2-r, MI: some processes have no decoder")
        )

    def figures(self, held: TargetSample, validation: Dataset, ranks: Ranks) -> dict[str, dict[str, Tensor]]:
        """The figures of held targets, by predictor and by name: fp64 [n]. Each rank takes its share of them.

        "truth" is among the predictors: what a round trip of the true concepts loses, and what the true sentences have
        of mutual information. All ranks call this.
        """
        mine = slice(ranks.rank, None, ranks.size)
        concepts = {"truth": held.truth[mine], **{name: values[mine] for name, values in held.predicted.items()}}
        told = self._decode(concepts)
        found: dict[str, dict[str, Tensor]] = {name: {} for name in concepts}
        if told is not None:
            again = self._encode(told)
            for name, vectors in again.items():
                found[name][ROUND_TRIP] = _spread(l2(vectors, held.truth[mine]), mine, len(held))
        if self.causal_lm is not None:
            before, true = sentences_of(validation, held.document[mine].tolist(), held.position[mine].tolist())
            for name, sentences in {**(told or {}), "truth": true}.items():
                found[name][MI] = _spread(self.causal_lm.mutual_information(before, sentences), mine, len(held))
        ranks.add_up(values for figures in found.values() for values in figures.values())
        return found

    def _decode(self, concepts: dict[str, Tensor]) -> dict[str, list[str]] | None:
        """A sentence for each concept; equal ones, such as those of a mean, are decoded once."""
        if self.decoder is None:
            return None
        whole = torch.cat(list(concepts.values())).numpy()
        different, places = np.unique(whole, axis=0, return_inverse=True)
        told = self.decoder.decode(different)
        sentences = iter([told[place] for place in places.reshape(-1)])
        return {name: list(islice(sentences, len(vectors))) for name, vectors in concepts.items()}

    def _encode(self, told: dict[str, list[str]]) -> dict[str, Tensor]:
        """The concepts of sentences; equal ones are encoded once."""
        assert self.encoder is not None
        different = sorted({sentence for sentences in told.values() for sentence in sentences})
        places = {sentence: place for place, sentence in enumerate(different)}
        concepts = torch.from_numpy(self.encoder.encode(different))
        return {name: concepts[[places[sentence] for sentence in sentences]] for name, sentences in told.items()}


def _spread(values: Tensor, mine: slice, count: int) -> Tensor:
    """This rank's values in their places among those of all, fp64 [count], zeros elsewhere."""
    found = torch.zeros(count, dtype=torch.float64)
    found[mine] = values.double()
    return found


def load_words(validation: Dataset, decoder: str | None, causal_lm: str | None, device: torch.device) -> TextMetrics:
    """What the text of the dataset's concepts is told with.

    decoder, causal_lm: hub ids or folders; default: the encoder's own decoder where it has one, and no language model.
    Raises InputError where what is named cannot be loaded.
    """
    described, errors = validation.info.encoder, Collector()
    named, where = decoder or decoder_name(described), f"{validation.path}/{DATASET}"
    speaks: SonarDecoder | None = None
    encoder: Encoder | None = None
    reads: CausalLM | None = None
    notes = []
    if named is None:
        notes.append(f"ℓ2-r, MI: no decoder is known for the encoder {described.get('model')}; --decoder names one")
    else:
        try:
            speaks = decoder_of(named, described, validation.embed_dim, str(device))
            encoder = encoder_of(described, validation.embed_dim, where, str(device))
        except InputError as error:
            speaks = None
            if decoder is not None:
                errors.errors.extend(f"--decoder: {mistake}" for mistake in error.errors)
            notes.append(f"ℓ2-r, MI: no decoder: {error}")
    if causal_lm is None:
        notes.append("MI: no language model is named; --causal-lm openai-community/gpt2 is the paper's")
    else:
        with errors:
            reads = CausalLM(causal_lm, device)
    errors.raise_if_any()
    return TextMetrics(encoder, speaks, reads, tuple(notes))


def sentences_of(
    dataset: Dataset, documents: Sequence[int], positions: Sequence[int]
) -> tuple[list[list[str]], list[str]]:
    """Of concepts at `positions` of `documents`, counted through the dataset: the BEFORE sentences in front of each,
    and its own. Raises InputError where the dataset has no sentences.
    """
    firsts = [0, *accumulate(shard.documents for shard in dataset.shards)]
    found: dict[int, tuple[list[str], str]] = {}
    opened: tuple[int, Shard] | None = None
    for place in sorted(range(len(documents)), key=documents.__getitem__):  # so that a shard is opened once
        document, position = documents[place], positions[place]
        index = bisect_right(firsts, document) - 1
        if opened is None or opened[0] != index:
            opened = index, open_shard(dataset, index)
        sentences = opened[1].meta(document - firsts[index])["sentences"]
        if not sentences:
            raise InputError(f"--causal-lm: {dataset.path}: has no sentences, which mutual information is told of")
        found[place] = sentences[max(0, position - BEFORE) : position], sentences[position]
    return [found[place][0] for place in range(len(found))], [found[place][1] for place in range(len(found))]
