"""Batches by tokens: each text once, little padding, the same concepts whatever the batch, close to fp32 in half."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import layers, rounding

from lcm_ds.config import EncoderConfig, SentencesConfig, SourceConfig
from lcm_ds.encoders import load_encoder
from lcm_ds.encoders.base import in_batches
from lcm_ds.encoders.sentence_transformer import SentenceTransformerEncoder
from lcm_ds.encoders.sonar import SonarEncoder
from lcm_ds.errors import InputError
from lcm_ds.text.open import open_source
from lcm_ds.text.splitter import Splitter

# For concepts of MiniLM (six layers; vectors of length 1) and of the tiny SONAR (two layers; numbers near 1).
MINILM, SONAR = rounding(layers(6, 384, 12, 1536, 64), size=384**-0.5), rounding(layers(2, 32, 4, 64, 16))
ODD = ["", "a", "🌞" * 50, "x" * 100_000, "השמש זורחת היום.", "It rains."]


def minilm(**changes: object) -> SentenceTransformerEncoder:
    config = {"name": "sentence-transformers", "model": "minilm", "backend": "torch", **changes}
    encoder = load_encoder(EncoderConfig(**config))  # type: ignore[arg-type]
    assert isinstance(encoder, SentenceTransformerEncoder)
    return encoder


def sonar(tiny_sonar: tuple[Path, Path], **changes: object) -> SonarEncoder:
    config = {"name": "sonar", "model": str(tiny_sonar[0]), "device": "cpu", **changes}
    encoder = load_encoder(EncoderConfig(**config))  # type: ignore[arg-type]
    assert isinstance(encoder, SonarEncoder)
    return encoder


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def pool() -> list[str]:
    """A few thousand real sentences, each once."""
    documents = open_source(SourceConfig(name="sample")).documents(0, 18)  # type: ignore[call-arg]
    splitter = Splitter(SentencesConfig())  # type: ignore[call-arg]
    return list(dict.fromkeys(splitter.split("\n\n".join(str(document.text) for document in documents))))


@pytest.fixture(scope="module")
def sentences(pool: list[str]) -> list[str]:
    """A few hundred of them."""
    return pool[:400]


@given(st.lists(st.integers(1, 600)), st.integers(1, 5000))
def test_each_text_is_in_one_batch_and_no_batch_is_too_large(lengths: list[int], tokens: int) -> None:
    batches = in_batches(lengths, tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens


def test_a_pool_of_real_sentences_is_hardly_padded(pool: list[str]) -> None:
    encoder = minilm()
    batches = encoder.tokenize(pool)
    tokens, places = sum(batch.tokens for batch in batches), sum(batch.padded_tokens for batch in batches)
    assert tokens == sum(int((batch.inputs["input_ids"] != 0).sum()) for batch in batches)  # 0: MiniLM's padding
    assert places == sum(batch.inputs["input_ids"].size for batch in batches)
    assert 1 - tokens / places < 0.05
    plain = [encoder.tokenize(pool[start : start + 10])[0] for start in range(0, len(pool), 10)]
    assert 1 - sum(batch.tokens for batch in plain) / sum(batch.padded_tokens for batch in plain) > 0.3


def test_the_same_texts_give_the_same_bytes_on_the_same_number_of_threads(sentences: list[str]) -> None:
    found: dict[int, list[np.ndarray]] = {1: [], 2: []}
    encoder, threads = minilm(), torch.get_num_threads()
    try:
        for number in (1, 2, 1, 2):
            torch.set_num_threads(number)
            found[number].append(encoder.encode(sentences[:60]))
            encoder.encode(sentences[60:90])  # what another unit holds leaves no trace
    finally:
        torch.set_num_threads(threads)
    for number, (first, again) in found.items():
        assert np.array_equal(first, again), f"{number} threads"
    assert cosine(found[1][0], found[2][0]).min() >= 0.9999  # another number may round otherwise


def test_concepts_do_not_depend_on_the_size_of_batches(sentences: list[str]) -> None:
    whole = minilm(dtype="float32").encode(sentences[:60])
    for tokens in (1, 300):
        again = minilm(dtype="float32", tokens_per_batch=tokens).encode(sentences[:60])
        np.testing.assert_allclose(again, whole, atol=MINILM)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_bfloat16_is_as_good_as_float32(sentences: list[str], backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    try:
        rounded = minilm(dtype="bfloat16", backend=backend)
    except InputError as error:
        pytest.skip(str(error))  # not on this CPU
    close = cosine(rounded.encode(sentences), minilm(dtype="float32").encode(sentences))
    assert close.min() >= 0.9999
    assert close.min() < 0.999999  # it was bfloat16


def test_odd_texts_have_concepts_and_none_has_none(tiny_sonar: tuple[Path, Path]) -> None:
    for encoder in (minilm(), sonar(tiny_sonar)):
        concepts = encoder.encode(ODD)
        assert concepts.shape == (len(ODD), encoder.embed_dim)
        assert np.isfinite(concepts).all()
        assert encoder.encode([]).shape == (0, encoder.embed_dim)
        assert encoder.tokenize([]) == []


def test_attention_is_fused_and_without_a_mask_where_nothing_is_padded(tiny_sonar: tuple[Path, Path]) -> None:
    encoder = sonar(tiny_sonar, dtype="float32")
    assert encoder._model.config._attn_implementation == "sdpa"
    assert minilm()._model[0].auto_model.config._attn_implementation == "sdpa"
    alike, padded = encoder.tokenize(["It rains."] * 3)[0], encoder.tokenize(["It rains.", "It rains today."])[0]
    assert "lengths" not in alike.inputs
    lengths = [batch.inputs["input_ids"].shape[1] for batch in (padded, alike)]
    assert padded.inputs["lengths"].tolist() == lengths
    first = padded.rows.tolist().index(0)
    np.testing.assert_allclose(encoder.embed(alike)[0], encoder.embed(padded)[first], atol=SONAR)


def test_a_model_with_a_prompt_of_its_own_gives_what_its_library_gives(tmp_path: Path, sentences: list[str]) -> None:
    from sentence_transformers import SentenceTransformer

    plain = minilm(dtype="float32")
    model = plain._model
    model.prompts, model.default_prompt_name = {"document": "passage: "}, "document"
    model.save(str(tmp_path / "prompted"))
    prompted = minilm(model=str(tmp_path / "prompted"), dtype="float32")
    expected = SentenceTransformer(str(tmp_path / "prompted"), device="cpu").encode(sentences[:20])
    np.testing.assert_allclose(prompted.encode(sentences[:20]), expected, atol=MINILM)
    assert np.abs(expected - minilm(dtype="float32").encode(sentences[:20])).max() > 1e-2


def test_a_model_without_a_tokenizer_of_transformers_gives_what_its_library_gives(
    tmp_path: Path, sentences: list[str]
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate({"?": None} | dict.fromkeys(" ".join(sentences).split()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu").save(str(tmp_path))
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(sentences[:20])
    for dtype in ("float32", "bfloat16"):  # bfloat16 is for products of matrices, and it has none
        np.testing.assert_allclose(minilm(model=str(tmp_path), dtype=dtype).encode(sentences[:20]), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_it_gives_the_same_concepts(tiny_sonar: tuple[Path, Path]) -> None:
    texts = ["It rains.", "It rains again today.", "Rain.", "It"]
    expected = sonar(tiny_sonar, dtype="float32").encode(texts)
    compiled = sonar(tiny_sonar, dtype="float32", compile=True).encode(texts)
    np.testing.assert_allclose(compiled, expected, atol=SONAR)
