"""Text to text: a prompt's sentences become concepts, the model continues them, and its concepts become sentences.

Concepts are decoded by their encoder's decoder (SONAR's). Without one, each is represented by the nearest sentence of a
dataset, with its cosine: the model predicts a point, it did not write that sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lcm_ds.checkpoint.model_source import ModelSource, find_model
from lcm_ds.data.concepts import ConceptInfo
from lcm_ds.data.format import Dataset
from lcm_ds.encoders import Encoder, from_dataset
from lcm_ds.encoders.base import resolve_device
from lcm_ds.errors import Collector, InputError
from lcm_ds.generate.retrieval import nearest_sentences
from lcm_ds.generate.sampler import END_OF_TEXT, generate
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.text.splitter import Splitter

if TYPE_CHECKING:
    from lcm_ds.encoders.sonar import SonarDecoder


@dataclass(frozen=True, eq=False)
class GeneratedText:
    """The continuation of one prompt."""

    prompt: list[str]  # the sentences that were continued
    left_out: int  # sentences at the beginning of the prompt that did not fit
    concepts: np.ndarray  # fp32 [m, embed_dim], raw space; the concept that a stop rule applied to is the last
    sentences: list[str]  # one for each concept
    cosines: list[float] | None  # of concepts to those of the retrieved sentences; None: the sentences are decoded
    reason: str  # END_OF_TEXT, REPEATS or MAX_CONCEPTS of lcm_ds.generate.sampler

    @property
    def text(self) -> str:
        """The sentences, without the end of text."""
        return " ".join(self.sentences[:-1] if self.reason == END_OF_TEXT else self.sentences)


class TextGenerator:
    """A model with its encoder, splitter and decoder or datasets, loaded once.

    >>> generator = TextGenerator.from_pretrained("runs/quickstart")
    >>> (result,) = generator.generate(["The sea was calm. We set sail at dawn."], max_concepts=4)
    >>> print(result.text, result.reason)
    """

    def __init__(
        self,
        model: BaseLCM,
        encoder: Encoder,
        splitter: Splitter,
        source: ModelSource,
        decoder: SonarDecoder | None,
        datasets: Sequence[Dataset],
        notes: Sequence[str] = (),
    ) -> None:
        assert source.info is not None
        self.model, self.encoder, self.splitter, self.source = model, encoder, splitter, source
        self.info = source.info
        self.decoder = decoder  # None: sentences are retrieved from the datasets
        self.datasets = list(datasets)
        self.notes = list(notes)  # for the user: what was loaded instead of what was expected
        end = self.info.end_of_text
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
        """Load a run or an exported folder.

        Args:
            path: the folder.
            step: of a run's checkpoint; default: the newest.
            device: default: cuda if available.
            decoder: hub id or folder; default: as the encoder's block in dataset.json or concepts.json names it, or the
                one that is known for the encoder.
            dataset: to retrieve sentences from if there is no decoder; default: a run's training datasets.
            prompt_language: an NLLB code, for SONAR; default: the language that the training data was encoded in.

        Raises:
            InputError: with every mistake that can be found before anything is loaded; then if an encoder or decoder
                cannot be loaded, or if there is neither a decoder nor a dataset to retrieve from.
        """
        errors, source = Collector(), None
        with errors:
            resolve_device(device)
        with errors:
            source = find_model(path, step, needs_info=True, dataset=dataset)
            assert source.info is not None
            from_dataset.encoder_config(source.info.encoder, source.info_path, device, prompt_language)
        if source is not None and source.info is not None:
            with errors:
                _check_language(source.info, prompt_language)
        errors.raise_if_any()
        assert source is not None
        assert source.info is not None
        info, embed_dim = source.info, source.config.embed_dim
        with errors:
            loaded, notes = _load_decoder(source, info, decoder, device, prompt_language)
            datasets = [] if loaded else _open_datasets(source, info, dataset, notes)
        with errors:
            splitter = Splitter.from_settings(info.splitter, info.language, source.info_path)
            encoder = from_dataset.encoder_of(info.encoder, embed_dim, source.info_path, device, prompt_language)
        errors.raise_if_any()
        model = source.load().to(resolve_device(device))
        return cls(model, encoder, splitter, source, loaded, datasets, notes)

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
        """Continue prompts, which are computed together.

        Args:
            prompts: texts.
            max_concepts: to generate for each prompt, at most.
            stop_end: stop after a concept whose cosine to the end-of-text concept is above this; None: do not.
            stop_repeat: stop after a concept whose cosine to the concept before it is above this; None: do not.
            language: of the output, an NLLB code; default: that of the prompts.
            beams: of the decoder's beam search.

        Raises:
            InputError: for a prompt without sentences, and for a language that the decoder does not know, or that needs
                a decoder.
        """
        self.check_language(language)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        split = [self.splitter.split(prompt) for prompt in prompts]
        if empty := [i for i, sentences in enumerate(split) if not sentences]:
            raise InputError(f"prompt {i + 1}, {prompts[i][:40]!r}: no sentence found" for i in empty)
        if not split:
            return []
        suffix = self.suffix
        room = max(1, self.info.max_segment - 1 - len(suffix))
        kept = [sentences[-room:] for sentences in split]
        encoded = torch.from_numpy(self.encoder.encode([one for sentences in kept for one in sentences + suffix]))
        inputs = encoded.split([len(sentences) + len(suffix) for sentences in kept])
        generated = generate(self.model, inputs, max_concepts, self._end, stop_end, stop_repeat)
        concepts = torch.cat([each.concepts for each in generated]).cpu().numpy()
        sentences, cosines = self._sentences(concepts, language, beams)
        ends = np.cumsum([0, *(len(each.concepts) for each in generated)]).tolist()
        return [
            GeneratedText(
                kept[i],
                len(split[i]) - len(kept[i]),
                concepts[first:end],
                sentences[first:end],
                None if cosines is None else cosines[first:end],
                generated[i].reason,
            )
            for i, (first, end) in enumerate(pairwise(ends))
        ]

    @property
    def suffix(self) -> list[str]:
        """Sentences that follow every prompt, as they followed every source when the model was fine-tuned."""
        return [] if self.info.source_suffix is None else [self.info.source_suffix]

    def check_language(self, language: str | None) -> None:
        """Raise InputError for an output language that is not available; None is the prompts' own."""
        if language is None:
            return
        if self.decoder is None:
            raise InputError(f"--language {language}: needs a decoder; retrieved sentences have the language they have")
        self.decoder.language_id(language)

    def _sentences(
        self, concepts: np.ndarray, language: str | None, beams: int
    ) -> tuple[list[str], list[float] | None]:
        """A sentence for each concept, [m, embed_dim] in raw space, and its cosine if it is retrieved."""
        if self.decoder is not None:
            return self.decoder.decode(concepts, beams, language=language), None
        retrieved = nearest_sentences(concepts, self.datasets)
        return [each.text for each in retrieved], [each.cosine for each in retrieved]


def _check_language(info: ConceptInfo, language: str | None) -> None:
    name = info.encoder.get("name")
    if language is not None and name != "sonar":
        raise InputError(f"--prompt-language {language}: is for SONAR only, not for encoder {name}")


def _load_decoder(
    source: ModelSource, info: ConceptInfo, named: str | None, device: str | None, language: str | None
) -> tuple[SonarDecoder | None, list[str]]:
    """The decoder, and a note if it should be there but is not. Raises InputError if the user named it."""
    model = named or from_dataset.decoder_name(info.encoder)
    if model is None:
        return None, []
    try:
        return from_dataset.decoder_of(model, info.encoder, source.config.embed_dim, device, language), []
    except InputError as error:
        if named is not None:
            raise InputError(f"--decoder: {mistake}" for mistake in error.errors) from None
        return None, [f"no decoder, the nearest sentences are shown instead: {error}"]


def _open_datasets(source: ModelSource, info: ConceptInfo, dataset: str | None, notes: list[str]) -> list[Dataset]:
    """The datasets to retrieve sentences from. Raises InputError if there are none, or if they do not fit the model."""
    paths = [each.path for each in source.training] if dataset is None else [dataset]
    if not paths:
        reasons = notes or [f"{source.info_path}: no decoder is known for encoder {info.encoder.get('model')!r}"]
        remedy = "name a decoder with --decoder, or a dataset of this encoder to retrieve sentences from with --dataset"
        raise InputError([*reasons, f"{source.path}: {remedy}"])
    opened, errors = source.open_datasets(paths), Collector()
    for each in opened:
        with errors:
            source.check_embed_dim(each)
            theirs, ours = (f"{of.get('name')} {of.get('model')}" for of in (each.info.encoder, info.encoder))
            if theirs != ours:
                raise InputError(f"{each.path}: made by encoder {theirs}, the model's is {ours} ({source.info_path})")
    errors.raise_if_any()
    return opened
