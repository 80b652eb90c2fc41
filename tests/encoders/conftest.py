"""A tiny SONAR on disk, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_sonar import save_tiny_sonar


@pytest.fixture(scope="session")
def tiny_sonar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of an encoder and a decoder with random weights and a real tokenizer."""
    return save_tiny_sonar(tmp_path_factory.mktemp("sonar"))
