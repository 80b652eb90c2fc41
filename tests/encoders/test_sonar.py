"""SONAR's encoder and decoder, with random weights but every part real."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tiny_sonar import TEXT, save_tiny_sonar
from tolerance import layers, rounding
from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from lcm_ds.config import EncoderConfig
from lcm_ds.encoders import load_encoder
from lcm_ds.encoders.sonar import SonarDecoder, SonarEncoder, nllb_languages, tokenizer_of_pieces
from lcm_ds.errors import InputError

CLOSE = rounding(layers(2, 32, 4, 64, 32))  # concepts of the tiny SONAR: two layers, numbers near 1
TEXTS = [
    "It rains in the mountains, and the river rises; nobody had expected it so early in the year!",
    "My name is SONAR.",
    "Yes.",
    "Who knows what 1,234 sentences sound like?",
    "Who knows?",
]


def sonar(folder: Path, **settings: object) -> SonarEncoder:
    config = EncoderConfig(name="sonar", model=str(folder), **{"dtype": "float32", "device": "cpu", **settings})
    encoder = load_encoder(config)
    assert isinstance(encoder, SonarEncoder)
    return encoder


def test_a_concept_is_the_mean_over_the_language_the_words_and_the_end(tiny_sonar: tuple[Path, Path]) -> None:
    tokenizer = NllbTokenizer.from_pretrained(tiny_sonar[0])
    model = M2M100Encoder.from_pretrained(tiny_sonar[0]).eval()
    words = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    ids = [tokenizer.convert_tokens_to_ids("eng_Latn"), *words, tokenizer.convert_tokens_to_ids("</s>")]
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    np.testing.assert_allclose(sonar(tiny_sonar[0]).encode(TEXTS[:1])[0], outputs.mean(dim=0).numpy(), atol=CLOSE)


def test_concepts_come_in_the_order_of_the_texts_and_do_not_depend_on_the_batch(tiny_sonar: tuple[Path, Path]) -> None:
    one_by_one = np.concatenate([sonar(tiny_sonar[0]).encode([text]) for text in TEXTS])
    assert one_by_one.dtype == np.float32
    assert one_by_one.shape == (len(TEXTS), 32)
    assert np.abs(one_by_one[:, None] - one_by_one[None]).sum(-1)[~np.eye(len(TEXTS), dtype=bool)].min() > 0.1
    for tokens_per_batch in (20, 4096):
        together = sonar(tiny_sonar[0], tokens_per_batch=tokens_per_batch).encode(TEXTS)
        np.testing.assert_allclose(together, one_by_one, atol=CLOSE)


def test_the_language_is_part_of_the_concept(tiny_sonar: tuple[Path, Path]) -> None:
    english, german = sonar(tiny_sonar[0]), sonar(tiny_sonar[0], language="deu_Latn")
    assert np.abs(english.encode(TEXTS) - german.encode(TEXTS)).max() > 1e-2


def test_texts_are_truncated_at_max_tokens_with_the_end_kept(tiny_sonar: tuple[Path, Path]) -> None:
    words = " ".join(["concept"] * 40)
    encoder = sonar(tiny_sonar[0], max_tokens=10)
    np.testing.assert_allclose(encoder.encode([words]), encoder.encode([words + " and more words"]), atol=CLOSE)
    assert encoder.tokenize([words])[0].inputs["input_ids"][0, -1] == 2
    assert sonar(tiny_sonar[0]).max_tokens == 64  # the model's own limit is lower than 512


def test_no_texts_give_no_concepts_and_an_empty_text_gives_one(tiny_sonar: tuple[Path, Path]) -> None:
    assert sonar(tiny_sonar[0]).encode([]).shape == (0, 32)
    assert np.isfinite(sonar(tiny_sonar[0]).encode([""])).all()


def test_bfloat16_points_where_float32_does(tiny_sonar: tuple[Path, Path]) -> None:
    exact, rounded = (sonar(tiny_sonar[0], dtype=dtype).encode(TEXTS) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == np.float32
    cosine = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosine.min() >= 0.9999
    assert not np.array_equal(exact, rounded)


def test_the_description_leads_back_to_the_same_encoder(tiny_sonar: tuple[Path, Path], tmp_path: Path) -> None:
    encoder = sonar(tiny_sonar[0])
    said = encoder.describe()
    assert said["embed_dim"] == encoder.embed_dim == 32
    config = EncoderConfig(**{key: value for key, value in said.items() if key in EncoderConfig.model_fields})
    np.testing.assert_array_equal(load_encoder(config).encode(TEXTS), encoder.encode(TEXTS))
    other, _ = save_tiny_sonar(tmp_path, seed=1)
    with pytest.raises(InputError, match=r"sha256:.*not sha256:"):
        load_encoder(config.model_copy(update={"model": str(other)}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": "en"}, "encoder.language: 'en'.*did you mean 'eng_Latn'"),
        ({"language": "ja"}, "encoder.language: 'ja'.*did you mean 'jpn_Jpan'"),
        ({"language": "Norwegian"}, "did you mean 'nob_Latn'"),
        ({"language": "concept"}, "'concept' is no language code"),  # a token, but not of a language
        ({"device": "gpu"}, "device: 'gpu' is no device"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not there"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused(
    tiny_sonar: tuple[Path, Path], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sonar(tiny_sonar[0], **settings)


def test_a_missing_or_wrong_model_is_one_mistake(tiny_sonar: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model 'no/such-model' is neither a folder") as error:
        sonar(Path("no/such-model"))
    assert len(error.value.errors) == 1
    assert "\n" not in error.value.errors[0]
    with pytest.raises(InputError, match="is neither a folder with a model"):
        sonar(tmp_path)
    with pytest.raises(InputError, match="is no M2M100Encoder: it lacks 35 weights"):
        sonar(tiny_sonar[1])
    with pytest.raises(InputError, match="is no M2M100ForConditionalGeneration: it lacks"):
        SonarDecoder(str(tiny_sonar[0]))
    without_tokenizer = shutil.copytree(tiny_sonar[0], tmp_path / "model")
    (without_tokenizer / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="its tokenizer 207: files are missing"):
        sonar(without_tokenizer)


def test_decoding_is_beam_search_from_the_concept_alone(tiny_sonar: tuple[Path, Path]) -> None:
    """Against a greedy search by hand for a beam of one, one by one for five; and the concepts stay as they were."""
    concepts = sonar(tiny_sonar[0]).encode(TEXTS)
    before = concepts.copy()
    decoder = SonarDecoder(str(tiny_sonar[1]), "fra_Latn", dtype="float32", device="cpu", batch_size=2)
    sentences = decoder.decode(concepts, beams=1, max_new_tokens=8)
    model = M2M100ForConditionalGeneration.from_pretrained(tiny_sonar[1]).eval()
    tokenizer = NllbTokenizer.from_pretrained(tiny_sonar[1])
    for concept, sentence in zip(concepts, sentences, strict=True):
        tokens = [2, tokenizer.convert_tokens_to_ids("fra_Latn")]
        while len(tokens) < 9 and tokens[-1] != 2:
            with torch.no_grad():
                states = model.model.decoder(
                    input_ids=torch.tensor([tokens]), encoder_hidden_states=torch.tensor(concept)[None, None]
                )
                tokens.append(int(model.lm_head(states.last_hidden_state[0, -1]).argmax()))
        assert sentence == tokenizer.decode(tokens, skip_special_tokens=True)
    beam = [
        model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=torch.tensor(concept)[None, None]),
            decoder_start_token_id=2,
            forced_bos_token_id=tokenizer.convert_tokens_to_ids("fra_Latn"),
            num_beams=5,
            max_new_tokens=8,
        )
        for concept in concepts
    ]
    by_beam = decoder.decode(concepts, max_new_tokens=8)
    assert by_beam == [tokenizer.decode(tokens[0], skip_special_tokens=True) for tokens in beam]
    assert by_beam != sentences
    np.testing.assert_array_equal(concepts, before)
    assert decoder.decode(concepts[:0]) == []


def test_decoding_refuses_concepts_of_another_size_and_unknown_languages(tiny_sonar: tuple[Path, Path]) -> None:
    decoder = SonarDecoder(str(tiny_sonar[1]), device="cpu")
    with pytest.raises(ValueError, match=r"\[n, 32\], not \[2, 16\]"):
        decoder.decode(np.zeros((2, 16), np.float32))
    with pytest.raises(InputError, match="'fr' is no language code"):
        SonarDecoder(str(tiny_sonar[1]), "fr")


def conversion(
    folder: Path, of: Path, weights: dict[str, torch.Tensor], architecture: str, file: str = "model.safetensors"
) -> Path:
    """A copy of an encoder's folder, with other names of its weights, and the architecture that its config names."""
    shutil.copytree(of, folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("architecture", "file", "embedding"),
    [
        ("M2M100Encoder", "pytorch_model.bin", None),
        ("M2M100EncoderModel", "model.safetensors", ("shared.weight",)),
        ("M2M100EncoderModel", "model.safetensors", ("encoder.embed_tokens.weight",)),
        ("M2M100EncoderModel", "pytorch_model.bin", ("shared.weight", "encoder.embed_tokens.weight")),
    ],
)
def test_every_conversion_of_the_hub_gives_the_same_concepts(
    tiny_sonar: tuple[Path, Path], tmp_path: Path, architecture: str, file: str, embedding: tuple[str, ...] | None
) -> None:
    """Of one layout as of the other: as M2M100Encoder, or inside of M2M100EncoderModel, in safetensors and pickled."""
    weights = load_file(tiny_sonar[0] / "model.safetensors")
    if embedding is not None:
        embedded = weights.pop("embed_tokens.weight")
        weights = {f"encoder.{name}": tensor for name, tensor in weights.items()}
        weights |= dict.fromkeys(embedding, embedded)
    folder = conversion(tmp_path / "model", tiny_sonar[0], weights, architecture, file)
    np.testing.assert_array_equal(sonar(folder).encode(TEXTS), sonar(tiny_sonar[0]).encode(TEXTS))
    lacking = {name: tensor for name, tensor in weights.items() if not name.endswith("layers.0.fc1.bias")}
    with pytest.raises(InputError, match="is no M2M100Encoder: it lacks 1 weights"):
        sonar(conversion(tmp_path / "lacking", tiny_sonar[0], lacking, architecture, file))


def test_a_conversion_without_a_tokenizer_takes_that_of_nllb(tiny_sonar: tuple[Path, Path], tmp_path: Path) -> None:
    without = shutil.copytree(tiny_sonar[0], tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (without / name).unlink()
    with pytest.raises(InputError, match=r"or another one belongs to it: encoder\.tokenizer, for SONAR facebook/nllb"):
        sonar(without)
    encoder = sonar(without, tokenizer=str(tiny_sonar[0]))
    np.testing.assert_array_equal(encoder.encode(TEXTS), sonar(tiny_sonar[0]).encode(TEXTS))
    assert encoder.describe()["tokenizer"] == str(tiny_sonar[0])
    assert "tokenizer" not in sonar(tiny_sonar[0]).describe()


def test_a_tokenizer_of_sentencepiece_alone_has_the_languages(tiny_sonar: tuple[Path, Path], tmp_path: Path) -> None:
    """Without them, transformers takes the language for <unk>."""
    folder, pieces = tmp_path / "model", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=pieces, vocab_size=150, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces/sentencepiece.bpe.model").write_bytes(pieces.getvalue())
    tokens = len(tokenizer_of_pieces(str(tmp_path / "pieces/sentencepiece.bpe.model")))
    save_tiny_sonar(folder, vocab_size=tokens)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "encoder" / name).unlink()
    shutil.copy(tmp_path / "pieces/sentencepiece.bpe.model", folder / "encoder")
    encoder = sonar(folder / "encoder", language="deu_Latn")
    first = encoder.tokenize(["It rains."])[0].inputs["input_ids"][0, 0]
    assert first == nllb_languages().index("deu_Latn") + tokens - 1 - len(nllb_languages())
    assert np.abs(encoder.encode(TEXTS) - sonar(folder / "encoder").encode(TEXTS)).max() > 1e-3


def test_distilled_encoders_have_the_sizes_of_their_config(tiny_sonar: tuple[Path, Path], tmp_path: Path) -> None:
    config = M2M100Config.from_pretrained(tiny_sonar[0])
    config.update({"encoder_layers": 1, "d_model": 16, "encoder_ffn_dim": 24, "encoder_attention_heads": 2})
    shutil.copytree(tiny_sonar[0], tmp_path / "model")
    M2M100Encoder(config).save_pretrained(tmp_path / "model")
    encoder = sonar(tmp_path / "model")
    assert encoder.embed_dim == encoder.describe()["embed_dim"] == 16
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 16)


def test_each_text_is_encoded_with_its_own_language(tiny_sonar: tuple[Path, Path]) -> None:
    encoder = sonar(tiny_sonar[0], tokens_per_batch=40)
    languages = ["deu_Latn", "eng_Latn", "jpn_Jpan", "deu_Latn", "eng_Latn"]
    together = encoder.encode(TEXTS, languages)
    for text, language, concept in zip(TEXTS, languages, together, strict=True):
        alone = sonar(tiny_sonar[0], language=language).encode([text])[0]
        np.testing.assert_allclose(concept, alone, atol=CLOSE)
    np.testing.assert_allclose(encoder.encode(TEXTS, ["eng_Latn"] * 5), encoder.encode(TEXTS), atol=CLOSE)
    with pytest.raises(ValueError, match="does not know the language 'tlh_Latn'"):
        encoder.tokenize(TEXTS[:1], ["tlh_Latn"])


@pytest.mark.hub
@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") == "1", reason="HF_HUB_OFFLINE is set")
def test_the_published_encoder_gives_the_published_numbers() -> None:
    encoder = load_encoder(EncoderConfig(name="sonar", model="cointegrated/SONAR_200_text_encoder", dtype="float32"))
    concept = encoder.encode(["My name is SONAR."])[0]
    np.testing.assert_allclose(concept[:5], [-0.005286, 0.002008, -0.000562, 0.006344, 0.006329], rtol=1e-3)
