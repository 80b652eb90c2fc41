"""Sentences a second that an encoder turns into concepts, beside the plain way on the same sentences.

python benchmarks/encode.py [--encoder minilm | sonar-random] [--parquet FILE …] [--sentences 3000] [--repeats 3]

The plain way is that of the published SONAR pipeline: batches of 10 sentences in their order, padded to the longest,
fp32, one process with all cores. `sonar-random` has SONAR's architecture (24 layers, width 1024, vocabulary 256,206),
random weights, and random token ids in place of a tokenizer: for speed they serve.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lcm_ds.config import EncoderConfig, SentencesConfig, SourceConfig
from lcm_ds.encoders import Encoder, load_encoder
from lcm_ds.encoders.base import TokenBatch, in_batches, pad, resolve_device, resolve_dtype, resolve_tokens_per_batch
from lcm_ds.encoders.sonar import embed
from lcm_ds.text.sentences import Splitter
from lcm_ds.text.sources import open_source

PLAIN_BATCH = 10
SONAR_TOKENS = 27  # a sentence of FineWeb-Edu, on average


class RandomSonar:
    """SONAR's encoder with random weights; a sentence has as many tokens as its characters say."""

    embed_dim = 1024

    def __init__(self, config: EncoderConfig) -> None:
        from transformers import M2M100Config
        from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

        torch.manual_seed(0)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.model_config = M2M100Config(
            vocab_size=256_206, d_model=1024, encoder_layers=24, encoder_attention_heads=16, encoder_ffn_dim=8192,
            max_position_embeddings=1024, scale_embedding=True,
        )  # fmt: skip
        with torch.device(self.device):
            model = M2M100Encoder(self.model_config).to(self.dtype).eval()
        self._run = torch.compile(model, dynamic=True) if config.compile else model
        self._tokens_per_batch = resolve_tokens_per_batch(config, self.device)

    def tokenize(self, texts: list[str]) -> list[TokenBatch]:
        """Random tokens."""
        random = np.random.default_rng(0)
        mean = sum(map(len, texts)) / len(texts)
        lengths = [min(512, max(3, round(SONAR_TOKENS * len(text) / mean))) for text in texts]
        tokens = [random.integers(4, 256_000, length).tolist() for length in lengths]
        found = []
        for rows in in_batches(lengths, self._tokens_per_batch):
            ids, mask = pad([tokens[row] for row in rows], 1)
            inputs = {"input_ids": ids, "attention_mask": mask}
            found.append(TokenBatch(rows, inputs, sum(lengths[row] for row in rows), ids.numel()))
        return found

    @torch.inference_mode()
    def embed(self, batch: TokenBatch) -> np.ndarray:
        """Concepts of a batch."""
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.inputs.items()}
        found: np.ndarray = embed(self._run, **inputs).cpu().numpy()
        return found

    def flops(self, batch: TokenBatch) -> float:
        """Of the batch's real tokens: two for each weight of the matrices, and attention over each sentence."""
        width, inner, layers = 1024, 8192, 24
        matrices = 2 * batch.tokens * layers * (4 * width * width + 2 * width * inner)
        lengths = batch.inputs["attention_mask"].sum(1).double()
        return matrices + float((4 * layers * width * lengths * lengths).sum())


def load(name: str, **settings: Any) -> Any:
    """An encoder of the benchmark by its name."""
    if name == "sonar-random":
        return RandomSonar(EncoderConfig(name="sonar", model="random", **settings))
    return load_encoder(EncoderConfig(name="sentence-transformers", model=name, **settings))


def main() -> None:
    """Measure each way in turn, again and again; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="minilm", help="minilm, sonar-random, or a model of sentence-transformers")
    parser.add_argument("--parquet", nargs="*", help="text; default: the documentation of Python and PyTorch")
    parser.add_argument("--sentences", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--plain-sentences", type=int, default=500, help="of the plain way, which is slow")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    sentences = read(arguments.parquet, arguments.sentences)
    plain_part = sentences[: arguments.plain_sentences]
    make = lambda **settings: load(arguments.encoder, device=str(device), **settings)  # noqa: E731
    dtypes = ["float32", "bfloat16", "float16"] if device.type == "cuda" else ["float32", "bfloat16"]
    plain = make(dtype="float32")
    ways: dict[str, Callable[[], float]] = {
        f"batches of {PLAIN_BATCH} in order, float32": lambda: plain_speed(plain, plain_part)
    }
    encoders = {dtype: make(dtype=dtype) for dtype in dtypes}
    for dtype, encoder in encoders.items():
        ways[f"batches by tokens, {dtype}"] = lambda encoder=encoder: speed(encoder, sentences)
    pools = []
    if device.type == "cuda":
        compiled = make(dtype="float16", compile=True)
        ways["batches by tokens, float16, compiled"] = lambda: speed(compiled, sentences)
    else:
        processes = len(os.sched_getaffinity(0))
        pool = multiprocessing.get_context("spawn").Pool(processes, start, (arguments.encoder,))
        pools.append(pool)
        parts = [sentences[part::processes] for part in range(processes)]
        name = f"batches by tokens, bfloat16, {processes} processes of a thread each (as prepare)"
        ways[name] = lambda: len(sentences) / seconds(lambda: pool.map(encode_part, parts, chunksize=1))
    for way in ways.values():  # warm up: kernels are chosen, graphs compiled, processes loaded
        way()
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            speeds[name].append(way())
    for pool in pools:
        pool.terminate()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores"
    batches = encoders[dtypes[-1]].tokenize(sentences)
    tokens, places = sum(batch.tokens for batch in batches), sum(batch.places for batch in batches)
    print(f"{arguments.encoder} on {where}, torch {torch.__version__}, Python {platform.python_version()}; "
          f"{len(sentences)} sentences, {tokens / len(sentences):.1f} tokens each; padding {1 - tokens / places:.1%}, "
          f"of the plain way {plain_padding(plain, plain_part):.1%}\n")  # fmt: skip
    base = statistics.median(next(iter(speeds.values())))
    print("| way | sentences/s (median) | ratio |\n| --- | ---: | ---: |")
    for name, values in speeds.items():
        middle = statistics.median(values)
        work = ""
        if isinstance(plain, RandomSonar):
            flops = sum(plain.flops(batch) for batch in batches) / len(sentences)
            work = f", {flops * middle / 1e12:.2f} TFLOP/s"
        print(f"| {name}{work} | {middle:,.0f} | {middle / base:.1f} |")


def read(parquet: Sequence[str] | None, count: int) -> list[str]:
    """The first sentences of parquet files, or of the documentation on this machine."""
    config = SourceConfig(name="huggingface", paths=list(parquet)) if parquet else SourceConfig(name="sample")
    splitter = Splitter(SentencesConfig())
    every = (sentence for document in open_source(config).documents() for sentence in splitter.split(document.text))
    return list(itertools.islice(every, count))


def plain_speed(encoder: Encoder, sentences: list[str]) -> float:
    """Sentences a second, ten at a time."""

    def run() -> None:
        for first in range(0, len(sentences), PLAIN_BATCH):
            for batch in encoder.tokenize(sentences[first : first + PLAIN_BATCH]):
                encoder.embed(batch)

    return len(sentences) / seconds(run)


def plain_padding(encoder: Encoder, sentences: list[str]) -> float:
    """The share of token places that are padding, ten sentences at a time."""
    tens = [encoder.tokenize(sentences[first : first + PLAIN_BATCH]) for first in range(0, len(sentences), PLAIN_BATCH)]
    tokens, places = (sum(getattr(batch, key) for ten in tens for batch in ten) for key in ("tokens", "places"))
    return 1 - tokens / places


def speed(encoder: Encoder, sentences: list[str]) -> float:
    """Sentences a second, as a pool; with tokenizing, which prepare does beside it."""

    def run() -> None:
        for batch in encoder.tokenize(sentences):
            encoder.embed(batch)

    return len(sentences) / seconds(run)


def seconds(run: Callable[[], Any]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


_own: Any = None  # in a process of the pool: its encoder


def start(name: str) -> None:
    """Load the encoder of a process."""
    global _own
    torch.set_num_threads(1)
    _own = load(name, device="cpu", dtype="bfloat16")


def encode_part(sentences: list[str]) -> None:
    """Encode one process's sentences."""
    for batch in _own.tokenize(sentences):
        _own.embed(batch)


if __name__ == "__main__":
    main()
