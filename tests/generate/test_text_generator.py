"""Text to text in Python: split and encoded as the model's dataset was; retrieved sentences are marked as such."""

import json
import re
import shutil
import time

import numpy as np
import pytest
import torch
from machine import patience

from lcm_ds.encoders.from_dataset import DECODERS, encoder_of
from lcm_ds.encoders.sonar import SonarDecoder
from lcm_ds.errors import InputError
from lcm_ds.generate.retrieval import nearest_sentences
from lcm_ds.generate.sampler import END_OF_TEXT, MAX_CONCEPTS, REPEATS, generate
from lcm_ds.generate.text_generator import TextGenerator
from lcm_ds.text.splitter import Splitter

PROMPT = "Rain falls on the hills.  The river rises in the night."
SENTENCES = ["Rain falls on the hills.", "The river rises in the night."]
FREE = {"stop_end": None, "stop_repeat": None}


@pytest.fixture(scope="module")
def encoder(dataset):
    return encoder_like(dataset)


@pytest.fixture(scope="module")
def generator(run_folder):
    return TextGenerator.from_pretrained(run_folder, device="cpu")


@pytest.fixture(scope="module")
def sonar(exported):
    return TextGenerator.from_pretrained(exported("sonar"), device="cpu")


def encoder_like(dataset, **changes):
    """The encoder of a dataset, with other entries in its block."""
    return encoder_of({**dataset.info.encoder, **changes}, dataset.embed_dim, f"{dataset.path}/dataset.json")


def splitter_of(info):
    return Splitter.from_settings(info.splitter, info.language, "dataset.json")


@pytest.mark.slow
def test_a_prompt_is_encoded_as_its_dataset_was(dataset, encoder):
    assert splitter_of(dataset.info).split(PROMPT) == SENTENCES
    for sentence, found in zip(SENTENCES, nearest_sentences(encoder.encode(SENTENCES), [dataset]), strict=True):
        assert found.text == sentence
        assert found.cosine == pytest.approx(1, abs=1e-3)
    assert encoder.describe() == dataset.info.encoder


def test_sentences_are_cut_as_those_of_the_dataset(dataset):
    assert splitter_of(dataset.info).settings() == dataset.info.splitter
    long = "word " * 50
    assert max(map(len, splitter_of(dataset.info).split(long))) <= 120


def test_the_defaults_serve_where_a_dataset_says_nothing(dataset):
    silent = dataset.info.model_copy(update={"splitter": {}, "language": None})
    assert splitter_of(silent).settings()["max_characters"] == 250


def test_prompts_go_on_together_as_the_model_goes_on_from_their_concepts(generator, dataset, encoder):
    prompts = [PROMPT, "Bread needs flour."]
    made = generator.generate(prompts, max_concepts=4, **FREE)
    for prompt, one in zip(prompts, made, strict=True):
        assert one.prompt == splitter_of(dataset.info).split(prompt)
        assert (one.left_out, one.reason, len(one.sentences)) == (0, MAX_CONCEPTS, 4)
        (expected,) = generate(generator.model, [torch.from_numpy(encoder.encode(one.prompt))], 4, **FREE)
        np.testing.assert_allclose(one.concepts, expected.concepts, atol=1e-4)
        found = nearest_sentences(one.concepts, [dataset])
        assert one.sentences == [f.text for f in found]
        assert one.cosines == pytest.approx([f.cosine for f in found], abs=1e-5)
        assert one.text == " ".join(one.sentences)
    (separate,) = generator.generate(prompts[1], max_concepts=4, **FREE)  # a string is one prompt
    np.testing.assert_allclose(separate.concepts, made[1].concepts, atol=1e-4)
    assert generator.generate([]) == []


def test_the_end_of_the_text_is_told_and_is_no_part_of_the_text(generator, dataset, monkeypatch):
    (free,) = generator.generate(PROMPT, max_concepts=4, **FREE)
    monkeypatch.setattr(generator, "_end", torch.from_numpy(free.concepts[2]))
    (made,) = generator.generate(PROMPT, max_concepts=4, stop_end=0.999, stop_repeat=None)
    assert (made.reason, len(made.sentences)) == (END_OF_TEXT, 3)
    assert made.text == " ".join(made.sentences[:2])


@pytest.mark.slow
def test_a_model_that_repeats_the_prompt_is_stopped_unless_that_is_off(exported):
    folder = exported("minilm", constant=True)  # always the same concept
    generator = TextGenerator.from_pretrained(folder, device="cpu", dataset=exported.datasets["minilm"].path)
    made = {stop: generator.generate(PROMPT, max_concepts=5, stop_repeat=stop)[0] for stop in (0.9, None)}
    assert [(one.reason, len(one.concepts)) for one in made.values()] == [(REPEATS, 2), (MAX_CONCEPTS, 5)]


def test_of_ten_thousand_sentences_those_that_fit_the_model_are_encoded(generator, monkeypatch):
    encoded = []
    encode = generator.encoder.encode
    monkeypatch.setattr(generator.encoder, "encode", lambda texts: encoded.extend(texts) or encode(texts))
    sentences = [f"This is sentence number {n}." for n in range(10_000)]
    start = time.monotonic()
    (made,) = generator.generate(" ".join(sentences), max_concepts=2)
    assert time.monotonic() - start < patience(30)
    assert encoded == made.prompt == sentences[-7:]  # the run's max_segment is 8
    assert made.left_out == 9_993


@pytest.mark.parametrize(
    ("prompt", "sentences"),
    [
        ("word", ["word"]),
        ("今天下雨了。河水上涨了！", ["今天下雨了。", "河水上涨了！"]),
        ("هل تمطر اليوم؟ نعم، تمطر.", ["هل تمطر اليوم؟", "نعم، تمطر."]),
        ("आज बारिश हो रही है। नदी बढ़ रही है।", ["आज बारिश हो रही है।", "नदी बढ़ रही है।"]),
        ("It\x00rains\x1b[31m.", ["It rains [31m."]),
    ],
)
def test_prompts_of_a_word_of_other_scripts_and_with_control_characters_are_taken(generator, prompt, sentences):
    (made,) = generator.generate([prompt], max_concepts=1)
    assert made.prompt == sentences
    assert len(made.sentences) == 1


def test_prompts_without_a_sentence_are_reported_all_at_once(generator):
    with pytest.raises(InputError) as refused:
        generator.generate(["", PROMPT, "\u200b"])
    assert refused.value.errors == [
        "prompt 1, '': no sentence found",
        "prompt 3, '\\u200b': no sentence found",
    ]


# --- concepts to sentences ----------------------------------------------------------------------------------------


def test_concepts_of_sonar_are_decoded_in_the_language_that_is_asked_for(sonar, tiny_sonar):
    (made,) = sonar.generate("It rains in the mountains.", max_concepts=2, **FREE)
    decoder = SonarDecoder(str(tiny_sonar[1]), device="cpu")
    assert made.cosines is None
    assert made.sentences == decoder.decode(made.concepts)
    other = {"language": "fra_Latn", "beams": 2}
    (french,) = sonar.generate("It rains in the mountains.", max_concepts=2, **FREE, **other)
    np.testing.assert_array_equal(french.concepts, made.concepts)
    assert french.sentences == decoder.decode(made.concepts, **other) != made.sentences


def test_a_prompt_in_another_language_is_encoded_as_such_and_answered_in_it(exported, sonar, tiny_sonar):
    german = TextGenerator.from_pretrained(exported("sonar"), device="cpu", prompt_language="deu_Latn")
    texts = ["It rains in the mountains."]
    assert np.abs(german.encoder.encode(texts) - sonar.encoder.encode(texts)).max() > 1e-2
    (made,) = german.generate(texts, max_concepts=1)
    assert made.sentences == SonarDecoder(str(tiny_sonar[1]), "deu_Latn", device="cpu").decode(made.concepts)


def test_languages_are_refused_before_any_work_where_nothing_speaks_them(generator, sonar, run_folder, monkeypatch):
    for some in (generator, sonar):
        monkeypatch.setattr(some.encoder, "encode", None)
    with pytest.raises(InputError, match="--language fra_Latn: needs a decoder"):
        generator.generate(PROMPT, language="fra_Latn")
    with pytest.raises(InputError, match="language: 'fr' is no language code"):
        sonar.generate(PROMPT, language="fr")
    with pytest.raises(InputError, match="--prompt-language fra_Latn: is for SONAR"):
        TextGenerator.from_pretrained(run_folder, prompt_language="fra_Latn")


def test_without_its_decoder_sonar_retrieves_sentences_and_notes_why(exported):
    folder, dataset = exported("sonar", decoder="no/such-decoder"), exported.datasets["sonar"]
    generator = TextGenerator.from_pretrained(folder, device="cpu", dataset=dataset.path)
    (note,) = generator.notes
    assert "no decoder, the nearest sentences are shown instead: model 'no/such-decoder'" in note
    (made,) = generator.generate("It rains in the mountains.", max_concepts=2)
    assert made.sentences == [found.text for found in nearest_sentences(made.concepts, [dataset])]
    with pytest.raises(InputError) as refused:
        TextGenerator.from_pretrained(folder, device="cpu")
    assert "no/such-decoder" in refused.value.errors[0]
    assert "a dataset of this encoder to retrieve sentences from with --dataset" in refused.value.errors[1]


def test_a_decoder_that_is_named_has_to_be_there_and_to_fit(exported, tiny_sonar):
    silent = exported("sonar", decoder=None)
    generator = TextGenerator.from_pretrained(silent, device="cpu", decoder=str(tiny_sonar[1]))
    assert generator.generate(PROMPT, max_concepts=1)[0].cosines is None
    with pytest.raises(InputError, match="--decoder: model 'no/such-decoder'"):
        TextGenerator.from_pretrained(silent, device="cpu", decoder="no/such-decoder")
    with pytest.raises(InputError, match=r"--decoder: decoder .* takes 32 numbers, a concept here has 384"):
        TextGenerator.from_pretrained(exported("minilm"), device="cpu", decoder=str(tiny_sonar[1]))


def test_the_decoder_of_metas_encoder_is_known():
    assert DECODERS["cointegrated/SONAR_200_text_encoder"] == "raxtemur/SONAR_200_text_decoder"


# --- model sources -------------------------------------------------------------------------------------------------


def test_an_exported_folder_generates_as_its_run_does(exported, generator):
    folder = exported("minilm")
    loaded = TextGenerator.from_pretrained(folder, device="cpu", dataset=exported.datasets["minilm"].path)
    assert loaded.source.step is None
    (one,), (other,) = (some.generate(PROMPT, max_concepts=3, **FREE) for some in (loaded, generator))
    np.testing.assert_array_equal(one.concepts, other.concepts)
    assert one.sentences == other.sentences


def test_a_fine_tuned_model_gets_its_suffix_behind_every_prompt(exported):
    folder = exported("sonar", source_suffix="[MODEL]:", max_segment=4)
    generator = TextGenerator.from_pretrained(folder, device="cpu")
    (made,) = generator.generate("One. Two. Three. Four.", max_concepts=1)
    assert (made.prompt, made.left_out) == (["Three.", "Four."], 2)
    concepts = torch.from_numpy(generator.encoder.encode([*made.prompt, "[MODEL]:"]))
    np.testing.assert_allclose(made.concepts, generate(generator.model, [concepts], 1)[0].concepts, atol=1e-5)


def test_an_export_without_concepts_json_needs_a_dataset(exported):
    folder = exported("minilm")
    (folder / "concepts.json").unlink()
    with pytest.raises(InputError, match=r"concepts.json is missing, .*: name a dataset"):
        TextGenerator.from_pretrained(folder, device="cpu")
    generator = TextGenerator.from_pretrained(folder, device="cpu", dataset=exported.datasets["minilm"].path)
    assert generator.generate(PROMPT, max_concepts=1)[0].prompt == SENTENCES


def test_a_dataset_of_another_encoder_is_not_retrieved_from(exported, synthetic_dataset):
    with pytest.raises(InputError, match="embed_dim 16, the model has 384"):
        TextGenerator.from_pretrained(exported("minilm"), device="cpu", dataset=str(synthetic_dataset()))
    sonar = exported.datasets["sonar"].path
    folder = exported("sonar", decoder=None, model="another")
    with pytest.raises(InputError) as refused:
        TextGenerator.from_pretrained(folder, device="cpu", dataset=sonar)
    assert re.search(r"made by encoder sonar .*, the model's is sonar another", refused.value.errors[0])


def test_another_dataset_can_replace_a_training_dataset_that_is_gone(run_folder, tmp_path, dataset):
    run = shutil.copytree(run_folder, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(re.sub(r"path: .*", "path: gone/dataset", config.read_text()))
    with pytest.raises(InputError, match="gone/dataset: no such dataset folder; name another dataset"):
        TextGenerator.from_pretrained(run, device="cpu")
    generator = TextGenerator.from_pretrained(run, device="cpu", dataset=dataset.path)
    assert generator.generate(PROMPT, max_concepts=1)[0].prompt == SENTENCES


def test_what_is_no_model_is_told_with_every_mistake(exported, tmp_path, run_folder):
    with pytest.raises(InputError, match=r"no run here .* and no exported model"):
        TextGenerator.from_pretrained(tmp_path)
    with pytest.raises(InputError) as refused:
        TextGenerator.from_pretrained(run_folder, step=7, device="cuda:99")
    assert len(refused.value.errors) == 2
    folder = exported("sonar")
    (folder / "concepts.json").write_text(json.dumps({"encoder": {}, "max_segment": "many"}))
    with pytest.raises(InputError) as refused:
        TextGenerator.from_pretrained(folder, step=7)
    assert [re.search("--step 7|max_segment", line) is not None for line in refused.value.errors] == [True, True]
    (folder / "model.safetensors").write_bytes(b"no weights")
    shutil.copy(exported("sonar") / "concepts.json", folder)
    with pytest.raises(InputError, match="cannot be loaded as a Base-LCM"):
        TextGenerator.from_pretrained(folder, device="cpu")


def test_an_encoder_of_another_kind_cannot_encode_a_prompt(dataset):
    with pytest.raises(InputError) as refused:
        encoder_like(dataset, name="unknown")
    (line,) = refused.value.errors
    assert f"{dataset.path}/dataset.json: encoder.name: 'unknown'" in line
    assert "sonar, sentence-transformers" in line


def test_other_weights_than_the_datasets_are_refused(dataset):
    with pytest.raises(InputError, match="sha256:0123456789abcdef"):
        encoder_like(dataset, revision="sha256:0123456789abcdef")
