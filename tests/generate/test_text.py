"""From a text to a text: cut and encoded as its dataset was; what is shown says where it is from."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lcm_ds.encoders.of_dataset import DECODERS
from lcm_ds.encoders.sonar import SonarDecoder
from lcm_ds.errors import InputError
from lcm_ds.generate.autoregressive import REPEATS, generate
from lcm_ds.generate.nearest import nearest
from lcm_ds.generate.text import encoder_of, go_on, run, splitter_of, told

PROMPT = "Rain falls on the hills.  The river rises in the night."


@pytest.fixture(scope="module")
def encoder(dataset):
    return encoder_of(dataset)


def with_encoder(dataset, **changes):
    """The dataset with other entries in its encoder's block; None removes one."""
    block = {key: value for key, value in {**dataset.info.encoder, **changes}.items() if value is not None}
    return replace(dataset, info=dataset.info.model_copy(update={"encoder": block}))


def lcm_ds_generate(*arguments):
    command = [sys.executable, "-m", "lcm_ds.cli", "generate", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_prompt_is_encoded_as_its_dataset_was(dataset, encoder):
    sentences = splitter_of(dataset).split(PROMPT)
    assert sentences == ["Rain falls on the hills.", "The river rises in the night."]
    for sentence, found in zip(sentences, nearest(encoder.encode(sentences), [dataset]), strict=True):
        assert found.text == sentence
        assert found.cosine == pytest.approx(1, abs=1e-3)
    assert encoder.describe() == dataset.info.encoder


def test_sentences_are_cut_as_those_of_the_dataset(dataset):
    assert splitter_of(dataset).settings() == dataset.info.splitter
    long = "word " * 50
    assert max(map(len, splitter_of(dataset).split(long))) <= 120


def test_the_defaults_serve_where_a_dataset_says_nothing(dataset):
    silent = replace(dataset, info=dataset.info.model_copy(update={"splitter": {}, "language": None}))
    assert splitter_of(silent).settings()["max_characters"] == 250


def test_what_is_printed_is_what_the_model_generates(dataset, encoder, make_model, capsys):
    model = make_model(dataset)
    made = go_on(model, [dataset], encoder, PROMPT, 4, max_segment=128)
    prompt = torch.from_numpy(encoder.encode(splitter_of(dataset).split(PROMPT)))
    assert dataset.info.end_of_text is not None
    (expected,) = generate(model, [prompt], 4, torch.tensor(dataset.info.end_of_text.vector))
    assert torch.equal(made.concepts, expected.concepts)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["prompt: 2 sentences", "      Rain falls on the hills.", "      The river rises in the night."]
    found = nearest(made.concepts.numpy(), [dataset])
    assert lines[3:-1] == [f"{n:4}  retrieved {f.cosine:6.3f} {f.text}" for n, f in enumerate(found, start=1)]
    assert lines[-1].startswith("stopped: ")


def test_a_model_that_repeats_the_prompt_is_stopped_and_said_to(dataset, encoder, make_model, capsys):
    model = make_model(dataset)
    with torch.no_grad():
        model.post_net.weight.zero_()  # always the same concept
    made = go_on(model, [dataset], encoder, PROMPT, 9, max_segment=128)
    assert (made.reason, len(made.concepts)) == (REPEATS, 2)
    assert capsys.readouterr().out.splitlines()[-1].startswith("stopped: the last concept repeats the one before")


def test_a_long_prompt_keeps_its_end_and_says_so(dataset, encoder, make_model, capsys):
    model = make_model(dataset)
    sentences = [f"This is sentence number {n}." for n in range(12)]
    made = go_on(model, [dataset], encoder, " ".join(sentences), 3, max_segment=8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "prompt: the last 7 of 12 sentences (data.max_segment is 8)"
    assert [line.strip() for line in lines[1:8]] == sentences[-7:]
    (expected,) = generate(model, [torch.from_numpy(encoder.encode(sentences[-7:]))], 1)
    assert torch.allclose(made.concepts[0], expected.concepts[0], atol=1e-5)
    # the first concept fills the segment; what follows lies beyond what was trained
    beyond = [number for number, line in enumerate(lines) if "longer than the 8 concepts" in line]
    assert beyond == ([9] if len(made.concepts) > 1 else [])


def test_concepts_of_sonar_are_decoded_where_a_decoder_is_named(sonar_dataset, make_model, capsys):
    model, encoder = make_model(sonar_dataset), encoder_of(sonar_dataset)
    made = go_on(model, [sonar_dataset], encoder, "It rains in the mountains.", 2, max_segment=128)
    sentences = SonarDecoder(sonar_dataset.info.encoder["decoder"]).decode(made.concepts.numpy())
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:-1] == [f"{n:4}  decoded          {sentence}" for n, sentence in enumerate(sentences, start=1)]


def test_without_its_decoder_sonar_is_shown_by_sentences_and_the_reason_is_told(sonar_dataset, capsys):
    queries = np.random.default_rng(0).normal(size=(2, sonar_dataset.embed_dim)).astype(np.float32)
    lines = told(queries, [with_encoder(sonar_dataset, decoder="no/such-decoder")])
    assert all(line.startswith("retrieved ") for line in lines)
    assert "no decoder, so the nearest sentences instead: model 'no/such-decoder'" in capsys.readouterr().out
    assert told(queries, [with_encoder(sonar_dataset, decoder=None)]) == lines
    assert capsys.readouterr().out == ""


def test_the_decoder_of_metas_encoder_is_known():
    assert DECODERS["cointegrated/SONAR_200_text_encoder"] == "raxtemur/SONAR_200_text_decoder"


def test_an_encoder_of_another_kind_cannot_encode_a_prompt(dataset):
    with pytest.raises(InputError) as refused:
        encoder_of(with_encoder(dataset, name="unknown"))
    (line,) = refused.value.mistakes
    assert f"{dataset.path}/dataset.json: encoder.name: 'unknown'" in line
    assert "sonar, sentence-transformers" in line


def test_other_weights_than_the_datasets_are_refused(dataset):
    with pytest.raises(InputError, match="sha256:0123456789abcdef"):
        encoder_of(with_encoder(dataset, revision="sha256:0123456789abcdef"))


def test_the_command_prints_the_whole_way_and_nothing_else(run_folder):
    done = lcm_ds_generate(run_folder, "--prompt", PROMPT, "--max-concepts", 3)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"{run_folder}: step 5"
    assert lines[1] == "prompt: 2 sentences"
    for line in lines[4:-1]:
        assert re.fullmatch(r" +\d  retrieved +-?\d\.\d{3} .+", line)
    assert 1 <= len(lines[4:-1]) <= 3
    assert lines[-1].startswith("stopped: ")


def test_mistakes_of_the_call_come_together_without_a_traceback(tmp_path):
    done = lcm_ds_generate(tmp_path / "none", "--prompt", " \n", "--max-concepts", 0)
    assert done.returncode == 2
    assert done.stdout == ""
    told_lines = done.stderr.splitlines()
    assert len(told_lines) == 3
    for line, part in zip(told_lines, ("--prompt: is empty", "--max-concepts: ", "none: no run here"), strict=True):
        assert part in line


def test_a_training_dataset_that_is_gone_is_named(run_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    config = copy / "config.yaml"
    config.write_text(re.sub(r"path: .*", "path: gone/dataset", config.read_text()))
    with pytest.raises(InputError, match="gone/dataset: no such dataset folder"):
        run(str(copy), PROMPT, 3)


def test_a_prompt_of_marks_alone_has_no_sentence_to_go_on_from(dataset, encoder, make_model):
    with pytest.raises(InputError, match="--prompt: no sentence"):
        go_on(make_model(dataset), [dataset], encoder, "\u200b", 3, max_segment=8)
