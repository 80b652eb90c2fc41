"""Text from text: a prompt's sentences become concepts, the model goes on from them, and its concepts become sentences.

Concepts go through the decoder of their encoder, SONAR's. Where there is none, and for encoders that have none, each is
shown by the nearest sentence of a dataset, with its cosine: the model predicts a point, it did not write that sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lcm_ds.data.format import Dataset
from lcm_ds.encoders import Encoder, from_dataset
from lcm_ds.encoders.base import resolve_device
from lcm_ds.errors import Collector, InputError
from lcm_ds.generate.origin import Origin, find_origin
from lcm_ds.generate.retrieval import nearest
from lcm_ds.generate.sampler import END_OF_TEXT, generate
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.text.splitter import Splitter

if TYPE_CHECKING:
    from lcm_ds.encoders.sonar import SonarDecoder


@dataclass(frozen=True, eq=False)
class GeneratedText:
    """What followed one prompt."""

    prompt: list[str]  # the sentences that were gone on from
    left_out: int  # sentences of the prompt before them, which the model has no room for
    concepts: np.ndarray  # fp32 [m, embed_dim], raw space; the one that a stop rule ended it with is its last
    sentences: list[str]  # one for each concept
    cosines: list[float] | None  # of concepts to those of the retrieved sentences; None: these are decoded
    reason: str  # END_OF_TEXT, REPEATS or MAX_CONCEPTS of lcm_ds.generate.sampler

    @property
    def text(self) -> str:
        """The sentences, without the one that stands for the end of the text."""
        return " ".join(self.sentences[:-1] if self.reason == END_OF_TEXT else self.sentences)


class TextGenerator:
    """A model with all that it takes from text to text, loaded once.

    >>> generator = TextGenerator.from_pretrained("runs/quickstart")
    >>> (made,) = generator.generate(["Lists are mutable. They grow."], max_concepts=4)
    >>> print(made.text, made.reason)
    """

    def __init__(
        self,
        model: BaseLCM,
        encoder: Encoder,
        splitter: Splitter,
        origin: Origin,
        decoder: SonarDecoder | None,
        datasets: Sequence[Dataset],
        notes: Sequence[str] = (),
    ) -> None:
        self.model, self.encoder, self.splitter, self.origin = model, encoder, splitter, origin
        self.decoder = decoder  # None: sentences are retrieved from the datasets
        self.datasets = list(datasets)
        self.notes = list(notes)  # what a user should know of how it was loaded
        end = origin.info.end_of_text
        self._end = None if end is None else torch.tensor(end.vector)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        step: int | None = None,
        device: str | None = None,
        decoder: str | None = None,
        dataset: str | None = None,
        prompt_language: str | None = None,
    ) -> TextGenerator:
        """Load a run (its checkpoint of `step`; default: the newest) or an exported folder.

        device: default: cuda where there is one. decoder: a hub id or folder; default: what the encoder's block in
        dataset.json or concepts.json names, or the one that is known. dataset: to retrieve sentences from where there
        is no decoder; default: a run's training datasets. prompt_language: an NLLB code, for SONAR; default: the
        language that the model's dataset was encoded in.

        Raises InputError with every mistake that can be told before anything is loaded, and then for an encoder or
        decoder that cannot be loaded, and where there is neither a decoder nor a dataset to retrieve from.
        """
        errors, origin = Collector(), None
        with errors:
            resolve_device(device)
        with errors:
            origin = find_origin(path, step, dataset)
            from_dataset.encoder_config(origin.info.encoder, origin.says_so, device, prompt_language)
        if origin is not None:
            with errors:
                _check_language(origin.info.encoder, prompt_language)
        errors.raise_if_any()
        assert origin is not None
        with errors:
            speaks, notes = _decoder_of(origin, decoder, device, prompt_language)
            datasets = [] if speaks else _to_retrieve_from(origin, notes)
        with errors:
            splitter = Splitter.from_settings(origin.info.splitter, origin.info.language, origin.says_so)
            encoder = from_dataset.encoder_of(
                origin.info.encoder, origin.embed_dim, origin.says_so, device, prompt_language
            )
        errors.raise_if_any()
        model = origin.load().to(resolve_device(device))  # type: ignore[arg-type]
        return cls(model, encoder, splitter, origin, speaks, datasets, notes)

    def generate(
        self,
        prompts: Sequence[str],
        max_concepts: int = 16,
        *,
        stop_end: float | None = 0.9,
        stop_repeat: float | None = 0.9,
        language: str | None = None,
        beams: int = 5,
    ) -> list[GeneratedText]:
        """Go on from each prompt, for at most `max_concepts` concepts; all are computed together.

        stop_end, stop_repeat: cosines to the end-of-text concept, and to the concept before, above which a text ends;
        None: never for that. language: of what comes out, an NLLB code; default: that of the prompts. beams: of the
        decoder's search. Raises InputError for a prompt without a sentence, and for a language without a decoder or
        that the decoder does not know.
        """
        self.check_language(language)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        split = [self.splitter.split(prompt) for prompt in prompts]
        if empty := [number for number, sentences in enumerate(split) if not sentences]:
            raise InputError(f"prompt {number + 1}, {prompts[number][:40]!r}: no sentence is found" for number in empty)
        if not split:
            return []
        after = self.after
        room = max(1, self.origin.info.max_segment - 1 - len(after))
        kept = [sentences[-room:] for sentences in split]
        concepts = torch.from_numpy(self.encoder.encode([one for sentences in kept for one in sentences + after]))
        encoded = concepts.split([len(sentences) + len(after) for sentences in kept])
        made = generate(self.model, encoded, max_concepts, self._end, stop_end, stop_repeat)
        concepts = torch.cat([one.concepts for one in made]).cpu()
        sentences, cosines = self._sentences(concepts.numpy(), language, beams)
        ends = np.cumsum([0, *(len(one.concepts) for one in made)]).tolist()
        return [
            GeneratedText(
                kept[number],
                len(split[number]) - len(kept[number]),
                concepts[first:end].numpy(),
                sentences[first:end],
                None if cosines is None else cosines[first:end],
                made[number].reason,
            )
            for number, (first, end) in enumerate(pairwise(ends))
        ]

    @property
    def after(self) -> list[str]:
        """What is put behind each prompt's sentences, as behind those that a fine-tuned model was trained on."""
        suffix = self.origin.info.source_suffix
        return [] if suffix is None else [suffix]

    def check_language(self, language: str | None) -> None:
        """Raise InputError for a language that no sentence can come out in; None: the prompts' own."""
        if language is None:
            return
        if self.decoder is None:
            raise InputError(f"--language {language}: needs a decoder; sentences that are retrieved are what they are")
        self.decoder.language_id(language)

    def _sentences(
        self, concepts: np.ndarray, language: str | None, beams: int
    ) -> tuple[list[str], list[float] | None]:
        """A sentence for each of `concepts` [m, embed_dim], raw space, and their cosines where they are retrieved."""
        if self.decoder is not None:
            return self.decoder.decode(concepts, beams, language=language), None
        found = nearest(concepts, self.datasets)
        return [one.text for one in found], [one.cosine for one in found]


def _check_language(described: dict[str, Any], language: str | None) -> None:
    if language is not None and described.get("name") != "sonar":
        raise InputError(
            f"--prompt-language {language}: is for SONAR; encoder {described.get('name')} is told no language"
        )


def _decoder_of(
    origin: Origin, named: str | None, device: str | None, language: str | None
) -> tuple[SonarDecoder | None, list[str]]:
    """The decoder, and why there is none where there should be. Raises InputError where the user named it."""
    described = origin.info.encoder
    model = named or from_dataset.decoder_name(described)
    if model is None:
        return None, []
    try:
        return from_dataset.decoder_of(model, described, origin.embed_dim, device, language), []
    except InputError as error:
        if named is not None:
            raise InputError(f"--decoder: {mistake}" for mistake in error.errors) from None
        return None, [f"no decoder, so the nearest sentences instead: {error}"]


def _to_retrieve_from(origin: Origin, notes: list[str]) -> list[Dataset]:
    """The datasets whose sentences stand for concepts. Raises InputError where there is none."""
    if not origin.places:
        said = notes or [f"{origin.says_so}: encoder {origin.info.encoder.get('model')!r} has no decoder that is known"]
        remedy = "--decoder has to name one, or --dataset a dataset of this encoder to retrieve sentences from"
        raise InputError([*said, f"{origin.path}: {remedy}"])
    return origin.open_datasets()
