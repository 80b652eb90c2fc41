"""A fixture that adopts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcm_ds.adopt.command import adoption_config
from lcm_ds.prepare.pipeline import prepare


@pytest.fixture
def adopt(tmp_path: Path) -> Callable[..., Path]:
    """Adopts in this process, without a validation split unless overrides ask for one; returns the output."""
    calls = iter(range(100))

    def run(source: str | Path, *overrides: str, **options: Any) -> Path:
        output = tmp_path / f"out-{next(calls)}"
        settings = ["validation=0", "documents_per_shard=10", *overrides]
        prepare(adoption_config(str(source), str(output), overrides=settings, **{"processes": 1, **options}))
        return output

    return run
