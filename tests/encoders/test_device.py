"""To the device and back: the host waits only where a result is taken, and token ids are those of the library."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_batches import ODD, minilm, sonar
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_ds.encoders import base
from lcm_ds.encoders.base import PendingBatch, TokenBatch, embeddings
from lcm_ds.encoders.sonar import SonarEncoder
from lcm_ds.encoders.tokenizer import BatchTokenizer, standalone

PADDED = ["It rains.", "It rains today, and nobody had expected it.", "Rain."]
# Operators whose result the host waits for.
WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "item")


class Operators(TorchDispatchMode):
    """Records the operators that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.calls.append((func.name().removeprefix("aten::").split(".")[0], (found, *args), kwargs))
        return found


@pytest.mark.parametrize("texts", [PADDED, ["It rains."] * 3])
@pytest.mark.parametrize("kind", ["minilm", "sonar"])
def test_starting_a_batch_waits_for_nothing(tiny_sonar: tuple[Path, Path], kind: str, texts: list[str]) -> None:
    encoder: Any = minilm(backend="torch") if kind == "minilm" else sonar(tiny_sonar)
    (batch,) = encoder.tokenize(texts)
    assert ("lengths" in batch.inputs) == (texts is PADDED)
    with Operators() as operators:
        encoder.embed(batch)
    names = {name for name, *_ in operators.calls}
    assert "scaled_dot_product_attention" in names
    assert names.isdisjoint(WAITING)
    # On the meta device: what is computed stays there, and nothing reads it.
    encoder._model.to("meta")
    encoder.device = torch.device("meta")
    with Operators() as operators:
        concepts = encoder.embed(batch)
    assert isinstance(concepts, torch.Tensor)
    assert concepts.device.type == "meta"
    assert {name for name, *_ in operators.calls}.isdisjoint(WAITING)


@pytest.mark.slow
def test_a_model_of_sentence_transformers_gives_the_bytes_of_its_library_with_and_without_padding() -> None:
    encoder, plain = (minilm(dtype="float32", backend="torch") for _ in range(2))
    plain._model[0]._forward_pre_hooks.clear()  # its mask is that of the library then
    for texts in (PADDED, ["It rains."] * 3):
        assert np.array_equal(encoder.encode(texts), plain.encode(texts))
        np.testing.assert_allclose(encoder._model.encode(texts), plain._model.encode(texts), rtol=0, atol=0)


def test_a_model_that_does_not_take_the_mask_of_pairs_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertModel

    forward = BertModel.forward

    def strict(self: Any, *args: Any, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        assert attention_mask.dim() == 2
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    expected = minilm(dtype="float32", backend="torch").encode(PADDED)
    monkeypatch.setattr(BertModel, "forward", strict)
    encoder = minilm(dtype="float32", backend="torch")
    assert not encoder._model[0]._forward_pre_hooks
    assert np.array_equal(encoder.encode(PADDED), expected)


def test_token_ids_go_to_a_gpu_from_page_locked_memory_without_waiting(
    tiny_sonar: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = sonar(tiny_sonar).tokenize(PADDED)
    made, copied = [], []

    def on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def recorded(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            made.append("locked" if pin_memory else str(device))
            return make(*args, **kwargs)

        return recorded

    def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copied.append(non_blocking)
        return target.set_(source.clone())

    cuda = torch.device("cuda")
    for name in ("empty", "arange"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    ids, mask = base.to_device(batch, cuda)
    monkeypatch.undo()
    assert made == ["locked", "cuda", "cuda", "locked", "cuda"]  # arange between the two arrays
    assert copied == [False, True, False, True]  # into page-locked memory, and from there
    expected_ids, expected_mask = base.to_device(batch, torch.device("cpu"))
    assert mask is not None
    assert expected_mask is not None
    assert torch.equal(ids, expected_ids)
    assert torch.equal(mask, expected_mask)
    assert mask.sum(1).tolist() == batch.inputs["lengths"].tolist()


def test_concepts_come_from_a_gpu_into_page_locked_memory_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with fake tensors on a device that this machine need not have."""

    class OnGPU:
        def embed(self, batch: TokenBatch) -> torch.Tensor:
            return torch.ones(3, 32, device="cuda")

    encoder: Any = OnGPU()
    events = []
    monkeypatch.setattr(base, "_now", lambda device: events.append(device))
    with FakeTensorMode(), Operators() as operators:
        found = PendingBatch(encoder, TokenBatch([0, 1, 2], {}, 3, 3))._concepts
    assert isinstance(found, torch.Tensor)
    assert (found.device.type, found.shape, found.dtype) == ("cpu", (3, 32), torch.float32)
    assert [name for name, *_ in operators.calls if name in ("empty", "copy_", "_to_copy")] == ["empty", "copy_"]
    (locked,) = [kwargs["pin_memory"] for name, _, kwargs in operators.calls if name == "empty"]
    (non_blocking,) = [args[-1] for name, args, _ in operators.calls if name == "copy_"]
    assert locked
    assert non_blocking
    assert events == [None, torch.device("cuda", 0)]  # the second one is behind the copy, and waited for


class LazyDevice:
    """Stands in for a GPU: a batch's concepts are there only once its event was waited for."""

    embed_dim = 2

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = torch.device("cpu")
        self.log: list[str] = []
        self._launched: list[Callable[[], None]] = []
        monkeypatch.setattr(base, "_now", self._event)

    def tokenize(self, texts: list[str]) -> list[TokenBatch]:
        return [TokenBatch([row], {"value": float(text)}, 1, 1) for row, text in enumerate(texts)]

    def embed(self, batch: TokenBatch) -> torch.Tensor:
        concepts, value = torch.full((1, 2), torch.nan), batch.inputs["value"]
        self.log.append(f"start {value:.0f}")

        def compute() -> None:
            self.log.append(f"wait {value:.0f}")
            concepts.fill_(value)

        self._launched.append(compute)
        return concepts

    def _event(self, device: torch.device | None) -> Any:
        launched = list(self._launched)

        class Event:
            def synchronize(self) -> None:
                launched[-1]()

            number = len(launched)

            def elapsed_time(self, end: Any) -> float:
                return {1: 40.0, 0: 7.0}[end.number - self.number]  # of a batch; between two of them

        return Event()


def test_the_next_batch_is_started_before_the_one_before_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = LazyDevice(monkeypatch)
    concepts = base.encode(encoder, ["5", "6", "7"])
    assert concepts.tolist() == [[5, 5], [6, 6], [7, 7]]
    assert encoder.log == ["start 5", "start 6", "wait 5", "start 7", "wait 6", "wait 7"]


def test_the_time_of_a_batch_is_the_devices_and_so_is_the_time_between_two(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = LazyDevice(monkeypatch)
    found = []
    for embedding in embeddings(encoder, encoder.tokenize(["5", "6", "7"])):
        embedding.result()
        found.append((embedding.seconds, embedding.waited))
    assert found == [(0.04, 0.0), (0.04, 0.007), (0.04, 0.007)]


def test_on_a_cpu_the_time_between_two_batches_is_that_of_the_host() -> None:
    class Slow:
        embed_dim = 1

        def embed(self, batch: TokenBatch) -> np.ndarray:
            time.sleep(0.02)
            return np.zeros((1, 1), np.float32)

    def batches() -> Iterator[TokenBatch]:
        for _ in range(2):
            time.sleep(0.05)
            yield TokenBatch([0], {}, 1, 1)

    encoder: Any = Slow()
    times = []
    for embedding in embeddings(encoder, batches()):
        embedding.result()
        times.append((embedding.seconds, embedding.waited))
    assert min(seconds for seconds, _ in times) >= 0.02
    assert times[0][1] == 0
    assert times[1][1] >= 0.05


def test_an_encoder_may_give_arrays_and_need_not_name_its_device() -> None:
    class Plain:
        embed_dim = 1

        def tokenize(self, texts: list[str]) -> list[TokenBatch]:
            return [TokenBatch([row], {"text": text}, 1, 1) for row, text in enumerate(texts)]

        def embed(self, batch: TokenBatch) -> np.ndarray:
            return np.array([[len(batch.inputs["text"])]], np.float32)

    encoder: Any = Plain()
    assert base.encode(encoder, ["a", "abc"]).tolist() == [[1], [3]]
    (embedding,) = embeddings(encoder, encoder.tokenize(["a"]))
    embedding.result()
    assert embedding.seconds > 0


# --- tokens -------------------------------------------------------------------------------------------------------


def library(encoder: Any, tiny_sonar: tuple[Path, Path]) -> Any:
    """The tokenizer of transformers behind an encoder."""
    if not isinstance(encoder, SonarEncoder):
        return encoder._model.tokenizer
    from transformers import NllbTokenizer

    return NllbTokenizer.from_pretrained(tiny_sonar[0], src_lang="deu_Latn")


@pytest.mark.parametrize("kind", ["minilm", "sonar"])
def test_token_ids_are_those_of_the_library_also_after_pickling(tiny_sonar: tuple[Path, Path], kind: str) -> None:
    encoder: Any = minilm(backend="torch") if kind == "minilm" else sonar(tiny_sonar, language="deu_Latn")
    texts = [*ODD, *PADDED, "It rains. " * 300]
    expected = library(encoder, tiny_sonar)(texts, truncation=True, max_length=encoder.max_tokens)["input_ids"]
    encoder.encode(PADDED)
    if kind == "minilm":
        encoder._model.encode(PADDED)  # the library changes its tokenizer's settings, which are not ours
    assert type(encoder.batch_tokenizer.tokenizer).__module__ == "tokenizers"
    for tokenize in (encoder.tokenize, encoder.batch_tokenizer, pickle.loads(pickle.dumps(encoder.batch_tokenizer))):
        found: dict[int, list[int]] = {}
        for batch in tokenize(texts):
            arrays = [batch.rows, *batch.inputs.values()]
            assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
            width = batch.inputs["input_ids"].shape[1]
            lengths = batch.inputs.get("lengths", np.full(len(batch.rows), width))
            for row, ids, length in zip(batch.rows.tolist(), batch.inputs["input_ids"], lengths, strict=True):
                found[row] = ids[:length].tolist()
            assert (batch.tokens, batch.padded_tokens) == (lengths.sum(), batch.inputs["input_ids"].size)
        assert [found[row] for row in range(len(texts))] == expected


class Letters:
    """A tokenizer in Python: no tokenizers inside."""

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text][:max_length] for text in texts]}


class Capitals(Letters):
    """One that does something of its own before it asks the tokenizer inside."""

    def __init__(self, inside: Any) -> None:
        self.backend_tokenizer = inside


def test_a_tokenizer_that_is_more_than_the_one_inside_is_used_as_it_is() -> None:
    inside = minilm().batch_tokenizer.tokenizer
    for tokenizer in (Letters(), Capitals(inside)):
        assert standalone(tokenizer, 5) is tokenizer
        (batch,) = BatchTokenizer(standalone(tokenizer, 5), 5, 100)(["ab", "abcdefg"])
        assert batch.rows.tolist() == [1, 0]
        assert batch.inputs["input_ids"].tolist() == [[97, 98, 99, 100, 101], [97, 98, 0, 0, 0]]
        assert batch.inputs["lengths"].tolist() == [5, 2]


@pytest.mark.parametrize("split", [True, False])
def test_a_special_token_in_a_text_is_what_the_library_takes_it_for(split: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "a", "<", "/", "s", ">", "</s>", "</"]
    inside = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inside.pre_tokenizer = pre_tokenizers.Whitespace()
    settings = {"unk_token": "[UNK]", "eos_token": "</s>", "split_special_tokens": split}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, **settings)
    (batch,) = BatchTokenizer(standalone(tokenizer, 16), 16, 100)(["a </s> a"])
    assert batch.inputs["input_ids"].tolist() == [[1, 7, 4, 5, 1] if split else [1, 6, 1]]
    assert batch.inputs["input_ids"].tolist() == [tokenizer("a </s> a")["input_ids"]]
    assert isinstance(standalone(tokenizer, 16), Tokenizer) == (not split)
