"""The source of text that a config names."""

from __future__ import annotations

from typing import Any

from lcm_ds.config import SentencesConfig, SourceConfig
from lcm_ds.text.base import Source
from lcm_ds.text.files import FilesSource
from lcm_ds.text.huggingface import HuggingFaceSource
from lcm_ds.text.sample import SampleSource


def open_source(
    config: SourceConfig, sentences: SentencesConfig | None = None, index: dict[str, Any] | None = None
) -> Source:
    """The source that a config names.

    sentences: how the texts will be split later: the source `sample` needs it to keep any sentence from occurring in
    two documents, `huggingface` its language, to compare with a column. index: what a source of the same config has
    found out; nothing is looked at again then. Raises InputError where files, a dataset or its columns are missing.
    """
    sentences = sentences or SentencesConfig()  # type: ignore[call-arg]
    if config.name == "sample":
        return SampleSource(config, sentences, index)
    if config.name == "files":
        return FilesSource(config, index)
    return HuggingFaceSource(config, sentences.language, index)
