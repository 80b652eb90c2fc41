"""How fast this machine encodes: the config's encoder on sentences of its source, for some seconds, in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import NamedTuple

from lcm_ds.config import PrepareConfig, SourceConfig
from lcm_ds.distributed.environment import detect_environment
from lcm_ds.errors import InputError
from lcm_ds.prepare.pipeline import threads
from lcm_ds.prepare.readers import Reader
from lcm_ds.prepare.texts import load_for_rank, sentences_of
from lcm_ds.text.open import open_source

FIRST, LARGEST = 64, 4096  # sentences encoded at once: to warm up, and at most


class Measured(NamedTuple):
    """A rate and what it was measured with."""

    rate: float  # sentences per second
    described: str
    embed_dim: int


def measure(config: PrepareConfig, seconds: float) -> Measured:
    """Encode for some seconds, and count.

    Args:
        config: Of the preparation, with an encoder.
        seconds: How long; reading and splitting are not counted.

    Raises:
        InputError: The encoder cannot be used.
    """
    with threads(config.threads):
        encoder = load_for_rank(config, detect_environment(os.environ))
        sentences, of = _endless(config)
        size, spent, count = FIRST, 0.0, 0
        encoder.encode(list(islice(sentences, FIRST)))  # the first call allocates, and may compile
        while spent < seconds:
            texts = list(islice(sentences, size))
            started = time.perf_counter()
            encoder.encode(texts)
            spent, count = spent + time.perf_counter() - started, count + len(texts)
            size = min(2 * size, LARGEST, max(FIRST, round((seconds - spent) * count / spent)))
    by = " by OpenVINO" if encoder.describe().get("backend") == "openvino" else ""
    told = f"measured here{by}: {count:,} sentences of {of} in {spent:.1f} s"
    return Measured(count / spent, told, encoder.embed_dim)


def _endless(config: PrepareConfig) -> tuple[Iterator[str], str]:
    """Sentences of the source, or of the sample text if that cannot be read, again and again; and which it is."""
    sample = config.model_copy(update={"source": SourceConfig(name="sample")})  # type: ignore[call-arg]
    for chosen, name in ((config, "the source"), (sample, "the sample text, as the source cannot be read")):
        try:
            reader = Reader(chosen, open_source(chosen.source, chosen.sentences.language))
            if found := list(islice((sentence for sentence, _ in sentences_of(reader)), 20 * LARGEST)):
                return chain.from_iterable(repeat(found)), name
        except InputError:
            continue
    raise InputError(f"{config.output}: neither the source nor the sample text has sentences to measure with")
