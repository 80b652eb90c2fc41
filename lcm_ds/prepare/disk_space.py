"""Whether the dataset will fit on the disk, estimated before anything is encoded."""

from __future__ import annotations

import shutil
from pathlib import Path

from lcm_ds.config import PrepareConfig
from lcm_ds.errors import InputError
from lcm_ds.text.base import Source

# FineWeb-Edu's 10BT sample: 46 G characters, about 0.5 G sentences.
CHARACTERS_PER_SENTENCE = 92
CHARACTERS_PER_DOCUMENT = 4753  # its mean, over 9,672,101 documents
BYTES = {"int8": 1, "float16": 2, "float32": 4}


def estimate(config: PrepareConfig, source: Source, embed_dim: int) -> int | None:
    """The approximate bytes of the dataset: a concept per 92 characters, and the text itself.

    None if the size of the source is not known.
    """
    characters = source.characters
    if characters is None:
        return None
    return dataset_bytes(config, characters / CHARACTERS_PER_SENTENCE, embed_dim)


def dataset_bytes(config: PrepareConfig, sentences: float, embed_dim: int) -> int:
    """The approximate bytes of a dataset: the concepts of its sentences, and the text itself.

    Args:
        config: Of the preparation.
        sentences: Their number.
        embed_dim: Numbers in a concept.
    """
    return round(sentences * (embed_dim * BYTES[config.dtype] + CHARACTERS_PER_SENTENCE))


def check(config: PrepareConfig, needed: int | None, total: int | None, given: int) -> None:
    """Raise InputError if the rest of the dataset will not fit.

    Args:
        config: Of the preparation.
        needed: The approximate bytes of the dataset; None if unknown.
        total: The number of documents; None if unknown.
        given: The number of documents that are done.
    """
    if not config.check_space or needed is None or not total:
        return
    needed = round(needed * (1 - min(1.0, given / total)))
    free = shutil.disk_usage(Path(config.output)).free
    if needed > free:
        raise InputError(
            f"{config.output}: output: the dataset takes about {needed / 1e9:,.3g} GB, {free / 1e9:,.3g} GB are free "
            "there; take fewer documents (source.take), another output, or check_space=false to start anyway"
        )
