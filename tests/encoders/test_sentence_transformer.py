"""The offline encoder: all-MiniLM-L6-v2 out of a Python package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import layers, rounding

from lcm_ds.config import EncoderConfig
from lcm_ds.encoders import Encoder, load_encoder, sentence_transformer
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


def test_local_attention_is_known_by_the_config() -> None:
    from transformers import BertConfig, LongformerConfig, MistralConfig, ModernBertConfig, Qwen2Config

    known = sentence_transformer.has_local_attention
    assert all(known(config()) for config in (ModernBertConfig, LongformerConfig, MistralConfig))
    assert not any(known(config) for config in (BertConfig(), Qwen2Config(), MistralConfig(sliding_window=None), None))
