"""The memory of an evaluation does not grow with the number of training documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import benchmark


@pytest.mark.slow
def test_ten_times_the_training_documents_take_the_same_memory(tmp_path: Path) -> None:
    script = benchmark("retrieval")
    script.make(tmp_path / "validation", 4000, 64, seed=0)
    memory = {}
    for concepts in (120_000, 1_200_000):  # the nearest neighbour is one of 100,000 concepts in both
        script.make(tmp_path / f"{concepts}", concepts, 64, seed=1)
        memory[concepts] = script.in_own_process(tmp_path / f"{concepts}", tmp_path / "validation")["memory"]
    assert memory[1_200_000] < 1.15 * memory[120_000], memory
