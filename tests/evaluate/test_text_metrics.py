"""Metrics that need text: round trip through a real decoder and encoder and a real language model."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lcm_ds.config import EncoderConfig
from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.encoders import load_encoder
from lcm_ds.errors import InputError
from lcm_ds.evaluate.target_sample import TargetSample
from lcm_ds.evaluate.text_metrics import MI, ROUND_TRIP, CausalLM, load_text_metrics, sentences_of

CPU = torch.device("cpu")
WORDS = ["\n", "rain", "falls", "river", "rises", "bread", "bakes"]
TEXTS = [["My name is SONAR.", "It rains in the mountains.", "The river rises."],
         ["Who knows?", "Nothing at all.", "A concept is one sentence.", "End of text."]]  # fmt: skip


@pytest.fixture(scope="module")
def sonar(tmp_path_factory):
    """Folders of a tiny SONAR, and a dataset of TEXTS that it made, in two shards."""
    from tiny_sonar import save_tiny_sonar

    folder = tmp_path_factory.mktemp("sonar")
    paths = save_tiny_sonar(folder)
    config = EncoderConfig(name="sonar", model=str(paths[0]), dtype="float32", device="cpu")
    encoder = load_encoder(config)
    out = folder / "dataset"
    out.mkdir()
    for number, sentences in enumerate(TEXTS):
        made = [Document("0000", f"text-{number}", "tests", sentences, encoder.encode(sentences))]
        commit(out, write_shard(out, f"{number}.tar", made, "float32"))
    write_normalizer(out, np.zeros(encoder.embed_dim), np.ones(encoder.embed_dim), {})
    finish(out, DatasetInfo(encoder=encoder.describe(), embed_dim=encoder.embed_dim, dtype="float32"))
    return paths, open_dataset(out), encoder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 of a few thousand weights that knows WORDS, on disk."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*WORDS, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS) + 1, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def sample(dataset, encoder, predicted):
    """Both documents' last concepts, with predictions of them."""
    truth = torch.from_numpy(encoder.encode([sentences[-1] for sentences in TEXTS]))
    return TargetSample(torch.arange(2), torch.tensor([0, 1]), torch.tensor([2, 3]), truth, predicted(truth))


def test_the_round_trip_is_the_distance_after_decoding_and_encoding(sonar):
    (_, decoder), dataset, encoder = sonar
    text_metrics = load_text_metrics(dataset, str(decoder), None, CPU)
    text_metrics.decoder.decode = partial(text_metrics.decoder.decode, max_new_tokens=12)  # a few words take less time
    some = sample(dataset, encoder, lambda truth: {"model": truth + 0.3, "constant": truth[:1].expand_as(truth)})
    found = text_metrics.compute(some, dataset, Ranks())
    assert set(found) == {"truth", "model", "constant"}
    again = encoder.encode(text_metrics.decoder.decode(torch.cat([some.truth, *some.predicted.values()]).numpy()))
    for name, concepts in zip(("truth", "model", "constant"), np.split(again, 3), strict=True):
        expected = np.linalg.norm(concepts - some.truth.numpy(), axis=1)
        assert found[name][ROUND_TRIP].tolist() == pytest.approx(expected, rel=1e-4)
    assert found["truth"][ROUND_TRIP].min() > 0  # a random decoder writes something else
    assert MI not in found["model"]


def test_mutual_information_compares_log_probabilities_with_and_without_context(gpt2):
    model = CausalLM(str(gpt2), CPU)
    weights = GPT2LMHeadModel.from_pretrained(gpt2).eval()

    def log_probability(head, text):
        ids = torch.tensor([[WORDS.index(word) for word in [*head, *text]]])
        logs = weights(ids).logits[0].log_softmax(-1)
        return sum(logs[len(head) + i - 1, WORDS.index(word)].item() for i, word in enumerate(text))

    before = [["rain falls"], ["bread bakes", "bread bakes"], ["rain"]]
    sentences = ["river rises", "rain", "bread bakes bread"]
    found = model.mutual_information(before, sentences)
    for number, (context, sentence) in enumerate(zip(before, sentences, strict=True)):
        text = sentence.split()
        given = log_probability([*" ".join(context).split(), "\n"], text)
        separate = log_probability(["\n"], text)
        assert found[number].item() == pytest.approx((given - separate) / len(text), abs=1e-4)


def test_a_context_beyond_the_positions_of_the_language_model_loses_its_beginning(gpt2):
    model = CausalLM(str(gpt2), CPU)
    assert model.max_length == 24
    long = model.mutual_information([["bread"] * 100 + ["rain falls"] * 11], ["river rises"])
    short = model.mutual_information([["rain falls"] * 11], ["river rises"])
    # 24 positions less newline and two words: the last 21 of the words, whatever was before
    assert long.item() == pytest.approx(short.item(), abs=1e-5)
    endless = model.mutual_information([["rain"]], ["bread " * 500])
    assert math.isfinite(endless.item())
    assert model.mutual_information([["rain"]], [""]).isnan().all()


def test_the_sentences_before_a_target_are_at_most_ten_of_its_own_document(sonar):
    _, dataset, _ = sonar
    before, own = sentences_of(dataset, [1, 0, 1], [3, 1, 1])
    assert before == [TEXTS[1][:3], TEXTS[0][:1], TEXTS[1][:1]]
    assert own == ["End of text.", "It rains in the mountains.", "Nothing at all."]


def test_without_a_decoder_there_is_a_note_and_true_sentences_still_have_mutual_information(sonar, gpt2):
    _, dataset, encoder = sonar
    text_metrics = load_text_metrics(dataset, None, str(gpt2), CPU)
    assert any("no decoder is known" in note and "--decoder" in note for note in text_metrics.notes)
    found = text_metrics.compute(sample(dataset, encoder, lambda truth: {"model": truth}), dataset, Ranks())
    assert ROUND_TRIP not in found["model"]
    assert MI not in found["model"]  # it has no text
    assert found["truth"][MI].isfinite().all()


def test_a_named_model_that_cannot_be_loaded_is_an_error(sonar, tmp_path):
    (_, decoder), dataset, _ = sonar
    with pytest.raises(InputError) as caught:
        load_text_metrics(dataset, str(tmp_path), str(tmp_path / "nowhere"), CPU)
    first, second = caught.value.errors
    assert first.startswith("--decoder: ")
    assert second.startswith("--causal-lm: ")
    wide = replace(dataset, info=dataset.info.model_copy(update={"embed_dim": 7}))
    with pytest.raises(InputError, match=r"--decoder: decoder .* takes 32 numbers, a concept here has 7"):
        load_text_metrics(wide, str(decoder), None, CPU)
