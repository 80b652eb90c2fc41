"""The offline encoder: all-MiniLM-L6-v2 out of a Python package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tolerance import layers, rounding

from lcm_ds.config import EncoderConfig
from lcm_ds.encoders import Encoder, load_encoder, sentence_transformer
from lcm_ds.encoders.from_dataset import encoder_config
from lcm_ds.errors import InputError

TEXTS = [
    "A dog runs over the meadow.",
    "Yes.",
    "The stock market fell sharply on Monday, and analysts expect further losses during the coming weeks.",
    "A puppy is running across the grass.",
]


def minilm(**settings: object) -> Encoder:
    config = {"name": "sentence-transformers", "model": "minilm", "device": "cpu", "dtype": "float32"}
    return load_encoder(EncoderConfig.model_validate(config | {"backend": "torch"} | settings))


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


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ModernBERT of four layers with random weights, most of which attend to the 32 tokens on each side."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import ModernBertConfig, ModernBertModel, PreTrainedTokenizerFast

    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = [*names.values(), "it", "rains", "nobody", "had", "expected", "so", "early", "in", "the", "year", "!", "."]
    rule = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    rule.normalizer, rule.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    rule.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    inputs = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rule, model_input_names=inputs, **names)
    config = ModernBertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, local_attention=64, pad_token_id=0, cls_token_id=2, sep_token_id=3,
        bos_token_id=2, eos_token_id=3, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    parts, saved = (str(tmp_path_factory.mktemp(name)) for name in ("parts", "saved"))
    ModernBertModel(config).save_pretrained(parts)
    tokenizer.save_pretrained(parts)
    SentenceTransformer(modules=[Transformer(parts), Pooling(32)], device="cpu").save(saved)
    return saved


def test_openvino_computes_what_torch_does(exact: Encoder) -> None:
    pytest.importorskip("openvino")
    native = openvino_types()
    for dtype in native:
        encoder = minilm(dtype=dtype, backend="openvino")
        assert encoder.describe() == exact.describe() | {"dtype": dtype, "backend": "openvino"}
        texts = [*TEXTS, TEXTS[2] * 20, *TEXTS[::-1]]
        concepts = encoder.encode(texts)
        assert (concepts * exact.encode(texts)).sum(axis=1).min() >= 0.9999
        np.testing.assert_array_equal(minilm(dtype=dtype, backend="openvino").encode(texts), concepts)
        assert encoder.encode([]).shape == (0, 384)
    if "bfloat16" not in native:
        with pytest.raises(InputError, match="does not compute in bfloat16 on this CPU"):
            minilm(dtype="bfloat16", backend="openvino")
    with pytest.raises(InputError, match="does not compute in float16 on this CPU"):
        minilm(dtype="float16", backend="openvino")


def openvino_types() -> list[str]:
    """Those that it computes in on this CPU."""
    from openvino import Core

    native = Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["float32", *(["bfloat16"] if "BF16" in native else [])]


def test_openvino_is_taken_if_it_is_installed_and_agrees(exact: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    assert minilm(backend=None).describe()["backend"] == "openvino"
    assert "backend" not in minilm(backend=None, dtype="float16").describe()

    def refuse(*_: object) -> None:
        raise RuntimeError("no conversion\nfor op::")

    def others(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.ones(*ids.shape, 384)

    def not_numbers(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.full((*ids.shape, 384), torch.nan if len(ids) > 1 else 1.0)

    def fixed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes of the trace")

    for convert, message in (
        (refuse, "openvino cannot convert minilm: no conversion$"),
        (lambda *_: others, "of minilm are not torch's: use torch$"),
        (lambda *_: not_numbers, "of minilm are not torch's: use torch$"),
        (lambda *_: fixed, "of minilm are not torch's: use torch$"),
    ):
        monkeypatch.setattr(sentence_transformer, "OpenVINOTransformer", convert)
        torch_instead = minilm(backend=None)
        assert "backend" not in torch_instead.describe()
        np.testing.assert_array_equal(torch_instead.encode(TEXTS), exact.encode(TEXTS))
        with pytest.raises(InputError, match=rf"encoder\.backend: .*{message}"):
            minilm(backend="openvino")
    monkeypatch.setattr(sentence_transformer, "openvino_is_installed", lambda: False)
    assert "backend" not in minilm(backend=None).describe()


def test_openvino_is_for_sentence_transformers_without_compile() -> None:
    for change, message in (
        ({"name": "sonar"}, "backend openvino is for sentence-transformers, not for sonar"),
        ({"compile": True}, "compile is for the backend torch"),
    ):
        with pytest.raises(ValidationError, match=message):
            minilm(backend="openvino", **change)


def test_openvino_tells_nobody_that_it_is_used(tmp_path: Path) -> None:
    """Its own import would write an id into the home folder and send an event."""
    pytest.importorskip("openvino")
    code = (
        "from lcm_ds.config import EncoderConfig; from lcm_ds.encoders import load_encoder\n"
        "encoder = load_encoder(EncoderConfig(name='sentence-transformers', model='minilm', backend='openvino'))\n"
        "print(encoder.encode(['It rains.']).shape)"
    )
    silent = {"CI", "TF_BUILD", "JENKINS_URL"}  # where openvino is silent by itself
    environment = {key: value for key, value in os.environ.items() if key not in silent}
    environment |= {"HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(1, 384)"
    assert not (tmp_path / "intel").exists()


def test_a_prompt_is_encoded_by_what_encoded_the_dataset_where_that_is_possible() -> None:
    described = {"name": "sentence-transformers", "model": "minilm", "dtype": "float32"}
    assert encoder_config(described, "dataset.json").backend == "torch"
    assert encoder_config(described | {"backend": "another"}, "dataset.json").backend == "torch"
    assert encoder_config(described | {"backend": "openvino"}, "dataset.json").backend is None  # or torch, on a GPU


@pytest.mark.parametrize("known", [True, False])
def test_local_attention_stays_local(windowed: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the model's config, and, if that has another name for it, because concepts of long texts would differ."""
    if not known:
        monkeypatch.setattr(sentence_transformer, "has_local_attention", lambda config: False)
    encoder = minilm(model=windowed)
    assert isinstance(encoder, sentence_transformer.SentenceTransformerEncoder)
    assert encoder.batch_tokenizer.tokenizer is not None  # the model gets token ids
    long = ["It rains so early in the year nobody had expected! " * 20, "Nobody had expected. " * 40, "It rains."]
    concepts = encoder.encode(long)
    close = rounding(layers(4, 32, 4, 64, 256))
    np.testing.assert_allclose(concepts, encoder._model.encode(long), atol=close)
    np.testing.assert_allclose(concepts, np.concatenate([encoder.encode([text]) for text in long]), atol=close)
    assert "backend" not in minilm(model=windowed, backend=None).describe()
    if known:
        with pytest.raises(InputError, match=r"gets the local attention of .* wrong"):
            minilm(model=windowed, backend="openvino")


def test_local_attention_is_known_by_the_config() -> None:
    from transformers import BertConfig, LongformerConfig, MistralConfig, ModernBertConfig, Qwen2Config

    known = sentence_transformer.has_local_attention
    assert all(known(config()) for config in (ModernBertConfig, LongformerConfig, MistralConfig))
    assert not any(known(config) for config in (BertConfig(), Qwen2Config(), MistralConfig(sliding_window=None), None))
