"""The offline encoder: all-MiniLM-L6-v2 out of a Python package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tolerance import layers, rounding

from lcm_ds.config import EncoderConfig
from lcm_ds.encoders import Encoder, load_encoder
from lcm_ds.errors import InputError

TEXTS = [
    "A dog runs over the meadow.",
    "Yes.",
    "The stock market fell sharply on Monday, and analysts expect further losses during the coming weeks.",
    "A puppy is running across the grass.",
]


def minilm(**settings: object) -> Encoder:
    config = {"name": "sentence-transformers", "model": "minilm", "device": "cpu", "dtype": "float32", **settings}
    return load_encoder(EncoderConfig.model_validate(config))


@pytest.fixture(scope="module")
def exact() -> Encoder:
    return minilm()


def test_concepts_come_in_order_as_unit_vectors_that_know_what_is_alike(exact: Encoder) -> None:
    concepts = exact.encode(TEXTS)
    assert concepts.dtype == np.float32
    assert concepts.shape == (4, exact.embed_dim) == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(concepts, axis=1), 1, atol=1e-5)
    likeness = concepts @ concepts.T
    assert likeness[0, 3] > 0.6
    assert likeness[0, 2] < 0.2
    one_by_one = np.concatenate([exact.encode([text]) for text in TEXTS])
    close = rounding(layers(6, 384, 12, 1536, 64), size=384**-0.5)  # six layers; numbers of a vector of length 1
    np.testing.assert_allclose(concepts, one_by_one, atol=close)
    assert exact.encode([]).shape == (0, 384)


def test_bfloat16_points_where_float32_does(exact: Encoder) -> None:
    rounded = minilm(dtype="bfloat16").encode(TEXTS)
    assert (rounded * exact.encode(TEXTS)).sum(axis=1).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(rounded, axis=1), 1, atol=1e-5)  # pooled and normalised in float32


def test_the_description_names_the_weights(exact: Encoder) -> None:
    said = exact.describe()
    assert said["model"] == "minilm"
    assert said["revision"].startswith("sha256:")
    assert said["dtype"] == "float32"
    assert said["max_tokens"] == 256
    assert minilm(max_tokens=64).describe()["max_tokens"] == 64
    with pytest.raises(InputError, match=r"encoder\.revision: the weights in .* are sha256:"):
        minilm(revision="sha256:0123456789abcdef")


def test_a_missing_model_is_one_mistake(tmp_path: Path) -> None:
    for model in ("no/such-model", str(tmp_path)):
        with pytest.raises(InputError, match="is neither a folder with a model") as error:
            minilm(model=model)
        assert len(error.value.errors) == 1
