"""Concepts in 8 bits: close to what they were, the same interface, and a training that does not notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from machine import patience

from lcm_ds.data.format import DatasetInfo, QuantParams, commit, finish, open_dataset, read_normalizer, write_normalizer
from lcm_ds.data.loader import Loader, validation_batches
from lcm_ds.data.normalizer import Constants, UniformSample, draw, fit
from lcm_ds.data.plan import Plan
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.shard import Shard, open_shard
from lcm_ds.data.supervised import source_of
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.errors import InputError


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_rounding_errs_by_half_a_step_at_most_and_what_is_far_out_is_cut_off() -> None:
    center, scale = np.float32([0.5, -2.0, 0.0]), np.float32([0.1, 3.0, 1.0])
    quantization = Quantization.of(center, scale)
    values = (np.random.default_rng(0).normal(size=(5000, 3)) * scale + center).astype(np.float32)
    decoded = quantization.decode(quantization.encode(values))
    assert decoded.dtype == np.float16
    # Half a step, and the rounding of float16 itself.
    assert (np.abs(decoded - values) <= quantization.step / 2 + np.abs(values) * 2**-11 + 1e-7).all()
    assert np.array_equal(quantization.encode(center[None]), [[0, 0, 0]])
    far = quantization.encode((center + 20 * scale)[None])
    assert np.array_equal(far, [[127, 127, 127]])
    assert np.allclose(quantization.decode(far), center + 8 * scale, rtol=1e-3)


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    """fp16 [n, 384]: MiniLM's embeddings of a few hundred sentences of books."""
    from lcm_ds.config import EncoderConfig, SentencesConfig, SourceConfig
    from lcm_ds.encoders import load_encoder
    from lcm_ds.text.open import open_source
    from lcm_ds.text.splitter import Splitter

    splitter = Splitter(SentencesConfig())  # type: ignore[call-arg]
    documents = open_source(SourceConfig(name="sample")).documents(0, 5)  # type: ignore[call-arg]
    sentences = list(dict.fromkeys(splitter.split("\n\n".join(str(document.text) for document in documents))))[:400]
    encoder = load_encoder(EncoderConfig(name="sentence-transformers", model="minilm"))  # type: ignore[call-arg]
    return encoder.encode(sentences).astype(np.float16)


def test_real_embeddings_keep_their_direction(real: np.ndarray) -> None:
    quantization = Quantization.of(*fit(real))
    decoded = quantization.decode(quantization.encode(real))
    assert cosine(decoded, real).min() >= 0.999
    relative = np.linalg.norm((decoded - real).astype(np.float64), axis=1) / np.linalg.norm(
        real.astype(np.float64), axis=1
    )
    assert relative.mean() < 0.03


def in_8_bits(folder: Path, out: Path) -> Path:
    """The same dataset, stored as int8."""
    dataset = open_dataset(folder)
    quantization = Quantization.of(*read_normalizer(folder))
    out.mkdir()
    for index, info in enumerate(dataset.shards):
        shard = open_shard(dataset, index)
        documents = []
        for number, key in enumerate(shard.keys):
            meta = shard.meta(number)
            documents.append(Document(key, meta["id"], meta["source"], meta["sentences"], shard.concepts(number)))
        commit(out, write_shard(out, info.name, documents, "int8", quantization))
    write_normalizer(out, *read_normalizer(folder), {})
    steps = QuantParams(center=quantization.center.tolist(), step=quantization.step.tolist())
    finish(out, dataset.info.model_copy(update={"dtype": "int8", "quantization": steps}))
    return out


def test_an_int8_dataset_reads_like_any_other_in_half_the_bytes(synthetic_dataset, tmp_path: Path) -> None:
    fp16 = synthetic_dataset(documents=60, embed_dim=256, documents_per_shard=20)
    int8 = in_8_bits(fp16, tmp_path / "int8")
    one, other = open_dataset(fp16), open_dataset(int8)
    assert other.info.totals.bytes < 0.65 * one.info.totals.bytes  # texts, headers and padding are as long as before
    shard, same = open_shard(one, 1), open_shard(other, 1)
    assert same.concepts(3).dtype == np.float16
    assert cosine(same.concepts(3), shard.concepts(3)).min() > 0.999
    assert np.array_equal(same.concepts(3, 1, 2), same.concepts(3)[1:2])
    assert np.array_equal(shard.concepts(3, 1), shard.concepts(3)[1:])
    samples = list(webdataset.WebDataset([str(int8 / shard.name)], shardshuffle=False).decode())
    assert samples[3]["npy"].dtype == np.int8
    assert other.storage is not None
    assert np.array_equal(other.storage.decode(samples[3]["npy"]), same.concepts(3))
    batches = [list(validation_batches(each, 32, 16, 4, 0, 1)) for each in (one, other)]
    for a, b in zip(*batches, strict=True):
        assert a.concepts.dtype == b.concepts.dtype
        assert np.array_equal(a.segment_ids, b.segment_ids)
        assert np.allclose(a.concepts, b.concepts, atol=0.05 * float(a.concepts.std()))


@pytest.mark.parametrize("workers", [0, 3])
def test_int8_comes_out_of_the_loader_as_it_comes_out_of_a_shard(synthetic_dataset, tmp_path: Path, workers) -> None:
    dataset = open_dataset(in_8_bits(synthetic_dataset(documents=60, documents_per_shard=5), tmp_path / "int8"))
    plan = Plan([source_of(dataset, 32, 16)], 0, 4, 32, epochs=1)
    loader = Loader([dataset], plan, 0, 1, 2, workers)
    read = np.concatenate([batch.concepts[batch.segment_ids >= 0].numpy() for batch in loader])
    loader.close()
    shards = [open_shard(dataset, index) for index in range(len(dataset.shards))]
    stored = np.concatenate([shard.concepts(document) for shard in shards for document in range(len(shard))])
    assert read.dtype == stored.dtype == np.float16
    assert sorted(map(bytes, read)) == sorted(map(bytes, stored))


@pytest.mark.slow
def test_a_training_on_int8_loses_what_one_on_fp16_loses(synthetic_dataset, tmp_path: Path) -> None:
    fp16 = synthetic_dataset(documents=300, embed_dim=16, documents_per_shard=10, seed=1)
    int8 = in_8_bits(fp16, tmp_path / "int8")
    runs = {}
    for name, data in (("fp16", fp16), ("int8", int8)):
        mapping = {
            "run_dir": str(tmp_path / f"run-{name}"),
            "model": {"preset": "quickstart", "embed_dim": 16, "hidden_size": 32, "intermediate_size": 64,
                      "num_hidden_layers": 2, "num_attention_heads": 4},
            "data": {"train": str(data), "row_length": 32, "max_segment": 16},
            "batch": {"rows_per_step": 8, "micro_batch_rows": 8},
            "optim": {"lr": 2.0e-3},
            "steps": 60,
            "log": {"every": 1},
            "deepspeed": "ds_configs/zero1_fp32.json",
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(mapping))
        command = [sys.executable, "-m", "lcm_ds.cli", "train", str(path)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        runs[name] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    losses = []
    for name, process in runs.items():
        said, _ = process.communicate(timeout=patience(240))
        assert process.returncode == 0, said.decode()
        lines = map(json.loads, (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    a, b = map(np.array, losses)
    assert len(a) == len(b) == 60
    assert a[-1] < 0.9 * a[0]
    np.testing.assert_allclose(b, a, rtol=0.01)


def test_what_is_wrong_with_the_steps_is_named(synthetic_dataset, tmp_path: Path) -> None:
    int8 = in_8_bits(synthetic_dataset(), tmp_path / "int8")
    text = (int8 / "dataset.json").read_text()
    (int8 / "dataset.json").write_text(text.replace('"dtype": "int8"', '"dtype": "float16"'))
    with pytest.raises(InputError, match="quantization is for dtype int8"):
        open_dataset(int8)
    info = DatasetInfo.model_validate_json(text)
    assert info.quantization is not None
    short = info.model_copy(update={"quantization": QuantParams(center=info.quantization.center[1:], step=[1.0] * 16)})
    (int8 / "dataset.json").write_text(short.model_dump_json())
    with pytest.raises(InputError, match=r"quantization\.center has 15 numbers, embed_dim is 16"):
        open_dataset(int8)
    bad = Document("a", "a", "s", ["One."], np.full((1, 16), np.nan, np.float32))
    with pytest.raises(InputError, match="is not finite"):
        write_shard(tmp_path, "x.tar", [bad], "int8", Quantization(np.zeros(16, np.float32), np.ones(16, np.float32)))


@pytest.mark.parametrize("size", [7, 100, 10_000])
@pytest.mark.parametrize("constants", [Constants(), Constants(end_of_text=True)])
def test_a_sample_drawn_without_reading_all_is_that_of_reading_all(synthetic_dataset, size, constants) -> None:
    dataset = open_dataset(synthetic_dataset(documents=60))
    opened: list[str] = []

    def open_one(info) -> Shard:
        opened.append(info.name)
        return open_shard(dataset, [shard.name for shard in dataset.shards].index(info.name))

    sample = UniformSample(size)
    for shard in dataset.shards:
        read = open_one(shard)
        last = np.concatenate([np.arange(length) == length - 1 for length in read.lengths])
        among = ~last if constants.end_of_text else None
        sample.add(shard.name, np.concatenate([read.concepts(i) for i in range(len(read))]), among)
    opened.clear()
    found = draw(dataset.shards, open_one, size, constants)
    assert np.array_equal(found, sample.concepts())
    if constants.end_of_text:
        assert not (found == np.float16(dataset.info.end_of_text.vector)).all(1).any()
        assert len(found) == min(size, dataset.info.totals.concepts - dataset.info.totals.documents)
    assert len(opened) == len(set(opened)) <= len(dataset.shards)
