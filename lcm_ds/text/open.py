"""The source of text that a config names."""

from __future__ import annotations

from typing import Any

from lcm_ds.config import SourceConfig
from lcm_ds.text.base import Source
from lcm_ds.text.files import FilesSource
from lcm_ds.text.huggingface import HuggingFaceSource
from lcm_ds.text.sample import SampleSource


def open_source(config: SourceConfig, language: str = "en", index: dict[str, Any] | None = None) -> Source:
    """The source that a config names.

    Args:
        config: The block `source`.
        language: That of the sentences; rows whose `language_column` differs are refused.
        index: The `index()` of a source opened with the same config: files are not inspected again.

    Returns:
        The source.

    Raises:
        InputError: A file, the dataset or one of its columns is missing.
    """
    if config.name == "sample":
        return SampleSource(config)
    if config.name == "files":
        return FilesSource(config, index)
    return HuggingFaceSource(config, language, index)
