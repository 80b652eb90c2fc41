"""`lcm-ds generate`: a text's sentences become concepts, the model goes on from them, and its concepts become text.

The concepts of SONAR go through its decoder. Where there is none, and for encoders that have none, each is shown by the
nearest sentence of the training datasets, marked as retrieved: the model predicts a point, it did not write that
sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lcm_ds.config import SentencesConfig, validate
from lcm_ds.data.format import DATASET, Dataset, open_for_run
from lcm_ds.encoders import Encoder, of_dataset
from lcm_ds.encoders.base import resolve_device
from lcm_ds.errors import Collector, InputError
from lcm_ds.generate.autoregressive import END_OF_TEXT, MAX_CONCEPTS, REPEATS, Generation, generate
from lcm_ds.generate.nearest import nearest
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.text.sentences import Splitter

REASONS = {
    END_OF_TEXT: "the last concept is the end of the text (cosine above 0.9)",
    REPEATS: "the last concept repeats the one before (cosine above 0.9)",
    MAX_CONCEPTS: "max_concepts was reached",
}


def run(run_dir: str, prompt: str, max_concepts: int) -> None:
    """Print what the newest checkpoint of a run makes of a prompt, a line a concept, and why it ended.

    Raises InputError for a prompt without a sentence, max_concepts below 1, a run without checkpoint, and for a
    training dataset that is not there or whose encoder is not known here.
    """
    from lcm_ds.train.checkpoint import load_model

    mistakes = Collector()
    if not prompt.strip():
        mistakes.mistakes.append("--prompt: is empty; generation goes on from at least one sentence")
    if max_concepts < 1:
        mistakes.mistakes.append(f"--max-concepts: has to be at least 1, not {max_concepts}")
    with mistakes:
        model, config, step = load_model(run_dir)
    mistakes.raise_if_any()
    data = config.data
    datasets: list[Dataset] = []
    for source in data.train:
        with mistakes:
            datasets.append(open_for_run(source.path, data))
    mistakes.raise_if_any()
    encoder = encoder_of(datasets[0])
    model.to(resolve_device(None))  # type: ignore[arg-type]
    print(f"{run_dir}: step {step}")
    go_on(model, datasets, encoder, prompt, max_concepts, data.max_segment)


def go_on(
    model: BaseLCM, datasets: Sequence[Dataset], encoder: Encoder, prompt: str, max_concepts: int, max_segment: int
) -> Generation:
    """Print the prompt's sentences, what follows them and why it ended; returns what followed.

    datasets: the run's training datasets, whose splitter, end-of-text and sentences are used. The model was trained on
    segments of at most `max_segment` concepts. Raises InputError for a prompt without a sentence.
    """
    sentences = splitter_of(datasets[0]).split(prompt)
    if not sentences:
        raise InputError("--prompt: no sentence is found in it")
    if len(sentences) < max_segment:
        print(f"prompt: {len(sentences)} sentences")
    else:
        print(f"prompt: the last {max_segment - 1} of {len(sentences)} sentences (data.max_segment is {max_segment})")
        sentences = sentences[1 - max_segment :]
    for sentence in sentences:
        print(f"      {sentence}")
    concepts = torch.from_numpy(encoder.encode(sentences))
    end = datasets[0].info.end_of_text
    (made,) = generate(model, [concepts], max_concepts, None if end is None else torch.tensor(end.vector))
    for number, line in enumerate(told(made.concepts.cpu().numpy(), datasets), start=1):
        if len(sentences) + number == max_segment + 1:
            print(f"from here on the text is longer than the {max_segment} concepts that the model was trained on")
        print(f"{number:4}  {line}")
    print(f"stopped: {REASONS[made.reason]}")
    return made


def told(concepts: np.ndarray, datasets: Sequence[Dataset]) -> list[str]:
    """A line for each of `concepts` [m, embed_dim], raw space: decoded where there is a decoder, else retrieved."""
    encoder = datasets[0].info.encoder
    named = of_dataset.decoder_name(encoder)
    if named is not None:
        try:
            decoder = of_dataset.decoder_of(named, encoder, datasets[0].embed_dim)
        except InputError as error:
            print(f"no decoder, so the nearest sentences instead: {error}")
        else:
            return [f"decoded          {sentence}" for sentence in decoder.decode(concepts)]
    return [f"retrieved {found.cosine:6.3f} {found.text}" for found in nearest(concepts, datasets)]


def splitter_of(dataset: Dataset) -> Splitter:
    """The splitter that cut the dataset's texts; the default one where the dataset does not say."""
    settings = dataset.info.splitter
    chosen: dict[str, Any] = {"language": settings.get("language") or dataset.info.language or "en"}
    pipeline = settings.get("pipeline", "sentencizer")
    if pipeline != "sentencizer":
        chosen["pipeline"] = pipeline.split(" ")[0]  # its version follows
    if "max_characters" in settings:
        chosen["max_characters"] = settings["max_characters"]
    return Splitter(validate(SentencesConfig, chosen, f"{dataset.path}/{DATASET}: splitter"))


def encoder_of(dataset: Dataset) -> Encoder:
    """The encoder that made the dataset's concepts. Raises InputError as lcm_ds.encoders.of_dataset.encoder_of."""
    return of_dataset.encoder_of(dataset.info.encoder, dataset.embed_dim, f"{dataset.path}/{DATASET}")
