"""Sentences per second of an encoder, compared with plain batching of the same sentences.

python benchmarks/encode.py [--encoder minilm | sonar-random] [--parquet FILE …] [--sentences N] [--repeats 3]

Plain batching is that of the published SONAR pipeline: batches of 10 sentences in their order, padded to the longest,
fp32, one process with all cores. `sonar-random` has SONAR's architecture (24 layers, width 1024, vocabulary 256,206),
random weights, and random token ids instead of a tokenizer, in proportion to the sentence's length, 27 on average,
which is enough to measure speed. TFLOP/s count real tokens without padding.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from lcm_ds.config import EncoderConfig, SentencesConfig, SourceConfig
from lcm_ds.encoders import Encoder, load_encoder
from lcm_ds.encoders.base import (
    TokenBatch,
    compute_in,
    in_batches,
    pad,
    resolve_device,
    resolve_dtype,
    resolve_tokens_per_batch,
)
from lcm_ds.encoders.sonar import embed
from lcm_ds.text.open import open_source
from lcm_ds.text.splitter import Splitter

PLAIN_BATCH = 10
UNIT = 5000  # sentences sorted by length together
SONAR_TOKENS = 27  # a sentence of FineWeb-Edu, on average
LAYERS, WIDTH, INNER = 24, 1024, 8192  # of SONAR


class RandomSonar:
    """SONAR's encoder with random weights; it uses only the length of texts, in units of `mean_length` characters."""

    embed_dim = WIDTH

    def __init__(self, config: EncoderConfig, mean_length: float) -> None:
        from transformers import M2M100Config
        from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

        torch.manual_seed(0)
        self.device = resolve_device(config.device)
        self.mean_length = mean_length
        architecture = M2M100Config(
            vocab_size=256_206, d_model=WIDTH, encoder_layers=LAYERS, encoder_attention_heads=16, encoder_ffn_dim=INNER,
            max_position_embeddings=1024, scale_embedding=True,
        )  # fmt: skip
        with torch.device(self.device):
            model = M2M100Encoder(architecture).eval()
        compute_in(model, resolve_dtype(config.dtype, self.device), self.device)
        self._run = torch.compile(model, dynamic=True) if config.compile else model
        self._tokens_per_batch = resolve_tokens_per_batch(config, self.device)

    def tokenize(self, texts: list[str]) -> list[TokenBatch]:
        """Random tokens."""
        lengths = [min(512, max(3, round(SONAR_TOKENS * len(text) / self.mean_length))) for text in texts]
        tokens = np.random.default_rng(0).integers(4, 256_000, sum(lengths)).tolist()
        ends = list(itertools.accumulate(lengths))
        found = []
        for rows in in_batches(lengths, self._tokens_per_batch):
            ids, mask = pad([tokens[ends[row] - lengths[row] : ends[row]] for row in rows], 1)
            inputs = {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask}
            found.append(TokenBatch(rows, inputs, sum(lengths[row] for row in rows), ids.numel()))
        return found

    @torch.inference_mode()
    def embed(self, batch: TokenBatch) -> np.ndarray:
        """Concepts of a batch."""
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.inputs.items()}
        found: np.ndarray = embed(self._run, **inputs).cpu().numpy()
        return found

    def flops(self, batch: TokenBatch) -> float:
        """FLOPs of the batch's real tokens: two per weight of the matrices, and attention over each sentence."""
        matrices = 2 * batch.tokens * LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)
        mask = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"]))
        return matrices + 4 * LAYERS * WIDTH * float(mask.sum(1).double().square().sum())


@dataclass(frozen=True)
class Way:
    """A way to encode all sentences."""

    name: str
    run: Callable[[], Any]
    plain: bool = False


def load(name: str, mean_length: float, **settings: Any) -> Any:
    """An encoder of the benchmark by its name."""
    if name == "sonar-random":
        return RandomSonar(EncoderConfig(name="sonar", model="random", **settings), mean_length)
    return load_encoder(EncoderConfig(name="sentence-transformers", model=name, **settings))


def main() -> None:
    """Measure the alternatives in turn, several times; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="minilm", help="minilm, sonar-random, or a model of sentence-transformers")
    parser.add_argument("--parquet", nargs="*", help="text; default: the documentation of Python and PyTorch")
    parser.add_argument("--sentences", type=int, help="default: 3000, on a GPU 20000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    gpu = device.type == "cuda"
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    sentences = read(arguments.parquet, arguments.sentences or (20_000 if gpu else 3000))
    mean_length = sum(map(len, sentences)) / len(sentences)

    def make(dtype: str, **settings: Any) -> Any:
        return load(arguments.encoder, mean_length, device=str(device), dtype=dtype, **settings)

    exact = make("float32")
    ways = [
        Way(f"batches of {PLAIN_BATCH} in order, float32", lambda: encode_plainly(exact, sentences), plain=True),
        Way("batches by tokens, float32", lambda: encode(exact, sentences)),
    ]
    for dtype in ("bfloat16", "float16") if gpu else ("bfloat16",):
        half = make(dtype)
        ways.append(Way(f"batches by tokens, {dtype}", lambda half=half: encode(half, sentences)))  # type: ignore[misc]
    best = str(resolve_dtype("auto", device)).removeprefix("torch.")
    pool = None
    if gpu:
        compiled = make(best, compile=True)
        ways.append(Way(f"batches by tokens, {best}, compiled", lambda: encode(compiled, sentences)))
    else:
        pool = multiprocessing.get_context("spawn").Pool(cores, start, (arguments.encoder, mean_length, best))
        parts = [sentences[part::cores] for part in range(cores)]
        name = f"batches by tokens, {best}, {cores} processes of a thread each (as prepare)"
        ways.append(Way(name, lambda: pool.map(encode_part, parts, chunksize=1)))
    for way in ways:  # warm up: kernels are chosen, graphs compiled, processes loaded
        way.run()
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(arguments.repeats):
        for way in ways:
            started = time.perf_counter()
            way.run()
            times[way.name].append(time.perf_counter() - started)
    if pool is not None:
        pool.terminate()

    batches = [batch for unit in units(sentences) for batch in exact.tokenize(unit)]
    plain = [batch for ten in tens(sentences) for batch in exact.tokenize(ten)]
    tokens = sum(batch.tokens for batch in batches)
    name = torch.cuda.get_device_name(device) if gpu else f"{cores} CPU cores"
    print(f"{arguments.encoder} on {name}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
          f"{platform.python_version()}; {len(sentences)} sentences of {tokens / len(sentences):.1f} tokens; "
          f"medians of {arguments.repeats}\n")  # fmt: skip
    flops = sum(map(exact.flops, batches)) if isinstance(exact, RandomSonar) else None
    print("| way | sentences/s (median) | ratio | padding |" + (" TFLOP/s |" if flops else ""))
    print("| --- | ---: | ---: | ---: |" + (" ---: |" if flops else ""))
    base = statistics.median(times[ways[0].name])
    for way in ways:
        seconds = statistics.median(times[way.name])
        padding = 1 - tokens / sum(batch.padded_tokens for batch in (plain if way.plain else batches))
        line = f"| {way.name} | {len(sentences) / seconds:,.0f} | {base / seconds:.1f} | {padding:.1%} |"
        print(line + (f" {flops / seconds / 1e12:.2f} |" if flops else ""))


def read(parquet: Sequence[str] | None, count: int) -> list[str]:
    """The first sentences of parquet files, or of the sample text."""
    config = SourceConfig(name="huggingface", paths=list(parquet)) if parquet else SourceConfig(name="sample")
    splitter = Splitter(SentencesConfig())
    every = (sentence for document in open_source(config).documents() for sentence in splitter.split(document.text))
    return list(itertools.islice(every, count))


def units(sentences: list[str]) -> list[list[str]]:
    """The sentences sorted by length together."""
    return [sentences[first : first + UNIT] for first in range(0, len(sentences), UNIT)]


def tens(sentences: list[str]) -> list[list[str]]:
    """The sentences of plain batches."""
    return [sentences[first : first + PLAIN_BATCH] for first in range(0, len(sentences), PLAIN_BATCH)]


def encode(encoder: Encoder, sentences: list[str]) -> None:
    """Encode units, each tokenized in a thread while the one before it is encoded, as prepare does."""
    with ThreadPoolExecutor(1) as tokenizer:
        for batches in [tokenizer.submit(encoder.tokenize, unit) for unit in units(sentences)]:
            for batch in batches.result():
                encoder.embed(batch)


def encode_plainly(encoder: Encoder, sentences: list[str]) -> None:
    """Encode ten sentences at a time, in order."""
    for ten in tens(sentences):
        for batch in encoder.tokenize(ten):
            encoder.embed(batch)


_own: Any = None  # in a process of the pool: its encoder


def start(name: str, mean_length: float, dtype: str) -> None:
    """Load the encoder of a process."""
    global _own
    torch.set_num_threads(1)
    _own = load(name, mean_length, device="cpu", dtype=dtype)


def encode_part(sentences: list[str]) -> None:
    """Encode one process's sentences."""
    encode(_own, sentences)


if __name__ == "__main__":
    main()
