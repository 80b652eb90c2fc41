"""The memory of an evaluation does not grow with the number of training documents."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from runs import ROOT


@pytest.mark.slow
def test_ten_times_the_training_documents_take_the_same_memory(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("retrieval_benchmark", ROOT / "benchmarks/retrieval.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.make(tmp_path / "validation", 4000, 64, seed=0)
    memory = {}
    for concepts in (120_000, 1_200_000):  # the nearest neighbour is one of 100,000 concepts in both
        benchmark.make(tmp_path / f"{concepts}", concepts, 64, seed=1)
        memory[concepts] = benchmark.in_own_process(tmp_path / f"{concepts}", tmp_path / "validation")["memory"]
    assert memory[1_200_000] < 1.15 * memory[120_000], memory
