"""Sentences per second of an encoder: on the device only, and all the way from texts to shards.

python benchmarks/encode.py [--encoder minilm | sonar-random] [--ways NAME …] [--sentences N] [--parquet FILE …]

- Plain: the published SONAR pipeline, batches of 10 sentences in their order, padded to the longest, fp32.
- Device only: the batches of one unit, tokenized before.
- Reading only: units are read, split and tokenized in other processes. Counted from when as many units as processes are
  read: all processes have started, unless one read several units while another still started.
- All the way: units are read, split and tokenized in other processes, encoded, and written as shards, by the code of
  `lcm-ds prepare`. Counted from the second unit on, when reading is ahead, to the last batch. (On a CPU, prepare has a
  process per core: benchmarks/prepare.py.)

"Device waits" is the share of the time between the first batch and the last that lies between two batches. Gaps within
a batch, which occur when the host starts kernels more slowly than the device computes them, are not counted.
`sonar-random` has SONAR's architecture (24 layers, width 1024, vocabulary 256,206) with random weights, which is enough
to measure speed; its sentences are made of random words, 27 tokens on average as in FineWeb-Edu, and need neither spaCy
nor pyarrow (without spaCy they are not split). TFLOP/s count real tokens without padding. Nothing is measured again
after 90 seconds; compiled ways take minutes and are measured only if --ways names them.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from lcm_ds.config import EncoderConfig, PrepareConfig, SentencesConfig, SourceConfig
from lcm_ds.data.format import SPLITS
from lcm_ds.distributed.environment import detect_environment
from lcm_ds.encoders import load_encoder
from lcm_ds.encoders.base import (
    TokenBatch,
    compute_in,
    embeddings,
    resolve_device,
    resolve_dtype,
    resolve_tokens_per_batch,
)
from lcm_ds.encoders.openvino import openvino_is_installed
from lcm_ds.encoders.sonar import SonarEncoder
from lcm_ds.encoders.tokenizer import BatchTokenizer
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.encode import Figures, WorkerContext, encode_units
from lcm_ds.prepare.readers import Readers, WorkUnit
from lcm_ds.prepare.state import IDS, SOURCE
from lcm_ds.text.open import open_source
from lcm_ds.text.splitter import Splitter

PLAIN_BATCH, PLAIN_SENTENCES = 10, 1000
UNIT = 50_000  # sentences: as many as a unit of configs/prepare/fineweb_edu_10bt.yaml
SENTENCES_PER_DOCUMENT = 10
LAYERS, WIDTH, INNER, VOCABULARY = 24, 1024, 8192, 256_206  # of SONAR
MAX_TOKENS = 512
SECONDS = 90.0  # nothing is measured again after this time
SPACY = importlib.util.find_spec("spacy") is not None


class RandomSonar(SonarEncoder):
    """SONAR's encoder with random weights, and a tokenizer made of the sentences."""

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer, layers: int) -> None:
        from transformers import M2M100Config
        from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

        torch.manual_seed(0)
        self.config, self.embed_dim, self.max_tokens = config, WIDTH, MAX_TOKENS
        self.model, self.revision = config.model, None
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        architecture = M2M100Config(
            vocab_size=VOCABULARY if layers == LAYERS else tokenizer.get_vocab_size(), d_model=WIDTH,
            encoder_layers=layers, encoder_attention_heads=16,
            encoder_ffn_dim=INNER, max_position_embeddings=1024, scale_embedding=True,
        )  # fmt: skip
        with torch.device(self.device):
            self._model = M2M100Encoder(architecture).eval()
        compute_in(self._model, self.dtype, self.device)
        self._run = torch.compile(self._model, dynamic=True) if config.compile else self._model
        tokens_per_batch = resolve_tokens_per_batch(config, self.device)
        self.batch_tokenizer = BatchTokenizer(tokenizer, MAX_TOKENS, tokens_per_batch, padding=1)


@dataclass(frozen=True)
class Measured:
    """What one pass over sentences took."""

    sentences: int
    seconds: float
    waited: float | None  # of the seconds, those between two batches
    batches: list[TokenBatch]  # of the same sentences, for padding and FLOPs


def main() -> None:
    """Measure the alternatives in turn, several times; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="minilm", help="minilm, sonar-random, or a model of sentence-transformers")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of sonar-random (default: {LAYERS}, as SONAR)")
    parser.add_argument("--ways", nargs="+", help="only alternatives whose name contains one of these")
    parser.add_argument("--parquet", nargs="*", help="text; default: the sample, for sonar-random random words")
    parser.add_argument("--sentences", type=int, help="all the way (default: 4000, on a GPU 250000)")
    parser.add_argument("--split-workers", type=int, default=2, help="processes that read, split and tokenize")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    began = time.perf_counter()
    device = resolve_device(arguments.device)
    gpu = device.type == "cuda"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    count = arguments.sentences or (250_000 if gpu else 4000)
    made = arguments.encoder == "sonar-random" and not arguments.parquet
    sentences = random_sentences(count) if made else read(arguments.parquet, count)
    ways = ways_of(arguments, device, sentences)
    times: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, run in ways.items():
            if not times[name] or time.perf_counter() - began < SECONDS:
                times[name].append(run())
    batches = times[next(iter(ways))][0].batches
    tokens = sum(batch.tokens for batch in batches) / sum(len(batch.rows) for batch in batches)
    card = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{arguments.encoder} on {card}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
          f"{platform.python_version()}; {tokens:.1f} tokens a sentence; all the way {len(sentences):,} sentences"
          f"{'' if SPACY else ', not split'}, in units of {unit_size(sentences):,}; at most {arguments.repeats} runs; "
          f"{time.perf_counter() - began:.0f} s in all\n")  # fmt: skip
    print_table(times, arguments)


def ways_of(
    arguments: argparse.Namespace, device: torch.device, sentences: list[str]
) -> dict[str, Callable[[], Measured]]:
    """The alternatives that are asked for, each warm.

    Args:
        arguments: Of the command line.
        device: To encode on.
        sentences: To encode all the way.

    Returns:
        What measures each, by its name.
    """
    unit, tokenizer = sentences[:UNIT], None
    if arguments.encoder == "sonar-random":
        tokenizer = train_tokenizer(unit[:10_000])
    wanted: Sequence[str] = arguments.ways or [""]
    best = str(resolve_dtype("auto", device)).removeprefix("torch.")
    loaded: dict[tuple[str, str], Any] = {}

    def encoder(dtype: str, kind: str = "") -> Any:
        key = (dtype, kind)
        if key not in loaded:
            settings: dict[str, Any] = {"device": str(device), "dtype": dtype, "compile": kind == "compiled"}
            if tokenizer is None:
                settings["backend"] = "openvino" if kind == "openvino" else "torch"
                config = EncoderConfig(name="sentence-transformers", model=arguments.encoder, **settings)
                loaded[key] = load_encoder(config)
            else:
                config = EncoderConfig(name="sonar", model="random", **settings)
                loaded[key] = RandomSonar(config, tokenizer, arguments.layers)
        return loaded[key]

    gpu = device.type == "cuda"
    ways: dict[str, Callable[[], Measured]] = {}
    name = f"plain: batches of {PLAIN_BATCH} in order, float32"
    if any(part in name for part in wanted):
        plain = encoder("float32")
        plain.encode(unit[:PLAIN_BATCH])
        ways[name] = lambda: encode_plainly(plain, unit[:PLAIN_SENTENCES])
    kinds = [(dtype, "") for dtype in dict.fromkeys([best, "bfloat16", *([] if tokenizer else ["float32"])])]
    if not (gpu or tokenizer) and openvino_is_installed():
        kinds += [(best, "openvino")]
    for dtype, kind in [*kinds, (best, "compiled")]:
        name = ", ".join(filter(None, ("device only", dtype, kind)))
        if any(part in name for part in wanted) and (arguments.ways or kind != "compiled"):
            fast = encoder(dtype, kind)
            batches = fast.tokenize(unit)
            list_of_results(fast, [batches[0], batches[-1]])
            ways[name] = lambda fast=fast, batches=batches: on_the_device(fast, batches)  # type: ignore[misc]
    workers = arguments.split_workers
    name = f"reading only, {workers} processes"
    if any(part in name for part in wanted):
        ways[name] = lambda: reading_only(encoder(best), sentences, workers)
    name = f"all the way, {best}, {workers} reading processes"
    if any(part in name for part in wanted):
        whole = encoder(best)
        batches = whole.tokenize(unit)
        list_of_results(whole, [batches[0], batches[-1]])
        ways[name] = lambda: replace(all_the_way(whole, sentences, workers), batches=batches)
    return ways


def print_table(times: dict[str, list[Measured]], arguments: argparse.Namespace) -> None:
    """The medians of all alternatives."""
    sonar = arguments.encoder == "sonar-random"
    print("| way | sentences/s (median) | from – to | ratio | device waits | padding |" + " TFLOP/s |" * sonar)
    print("| --- | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * sonar)
    base = None
    for name, found in times.items():
        speeds = sorted(each.sentences / each.seconds for each in found)
        speed = statistics.median(speeds)
        base = base or speed
        waits = [each.waited / each.seconds for each in found if each.waited is not None]
        batches = found[0].batches
        padding = 1 - sum(batch.tokens for batch in batches) / sum(batch.padded_tokens for batch in batches)
        line = f"| {name} | {speed:,.0f} | {speeds[0]:,.0f} – {speeds[-1]:,.0f} | {speed / base:.1f} | "
        line += f"{f'{statistics.median(waits):.1%}' if waits else ''} | {padding:.1%} |"
        if sonar:
            each = sum(flops(batch, arguments.layers) for batch in batches) / sum(len(batch.rows) for batch in batches)
            line += f" {speed * each / 1e12:.2f} |"
        print(line)


def flops(batch: TokenBatch, layers: int) -> float:
    """FLOPs of a batch's real tokens: two per weight of the matrices, and attention over each sentence."""
    matrices = 2 * batch.tokens * layers * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)
    ids = batch.inputs["input_ids"]
    lengths = batch.inputs.get("lengths", np.full(len(ids), ids.shape[1]))
    return matrices + 4 * layers * WIDTH * float(np.square(lengths.astype(np.float64)).sum())


def read(parquet: Sequence[str] | None, count: int) -> list[str]:
    """The first sentences of parquet files, or of the sample text."""
    config = SourceConfig(name="huggingface", paths=list(parquet)) if parquet else SourceConfig(name="sample")
    splitter = Splitter(SentencesConfig())
    every = (sentence for document in open_source(config).documents() for sentence in splitter.split(document.text))
    return list(itertools.islice(every, count))


def random_sentences(count: int) -> list[str]:
    """Sentences of random words, 20 on average, frequent and rare ones as in a language."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmwfgypbvk"))
    lengths = np.minimum(12, 1 + draw.geometric(0.28, 20_000))
    words = np.array(["".join(draw.choice(letters[:22], length)) for length in lengths])
    share = 1 / np.arange(3, len(words) + 3)
    sizes = np.clip(draw.lognormal(np.log(17), 0.55, count), 2, 60).astype(int)
    every = words[draw.choice(len(words), int(sizes.sum()), p=share / share.sum())].tolist()
    ends = np.cumsum(sizes).tolist()
    starts = [0, *ends[:-1]]
    return [" ".join(every[start:end]).capitalize() + "." for start, end in zip(starts, ends, strict=True)]


def train_tokenizer(sentences: list[str]) -> Tokenizer:
    """Byte pairs of the sentences; a text is, as for SONAR, a token for the language, its own tokens, and </s>."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "eng_Latn"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=9000, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(
        "eng_Latn $0 </s>", special_tokens=[("eng_Latn", 4), ("</s>", 2)]
    )
    made.enable_truncation(MAX_TOKENS)
    return made


def encode_plainly(encoder: Any, sentences: list[str]) -> Measured:
    """Encode ten sentences at a time, in order, each waited for."""
    batches: list[TokenBatch] = []
    started = time.perf_counter()
    for first in range(0, len(sentences), PLAIN_BATCH):
        (batch,) = encoder.tokenize(sentences[first : first + PLAIN_BATCH])
        list_of_results(encoder, [batch])
        batches.append(batch)
    return Measured(len(sentences), time.perf_counter() - started, None, batches)


def list_of_results(encoder: Any, batches: list[TokenBatch]) -> list[np.ndarray]:
    """The concepts of batches."""
    return [embedding.result() for embedding in embeddings(encoder, batches)]


def on_the_device(encoder: Any, batches: list[TokenBatch]) -> Measured:
    """Encode batches; their concepts are dropped."""
    started, waited = time.perf_counter(), 0.0
    for embedding in embeddings(encoder, batches):
        embedding.result()
        waited += embedding.waited
    return Measured(sum(len(batch.rows) for batch in batches), time.perf_counter() - started, waited, batches)


class Snapshots(Coordinator):
    """Keeps the figures of the moment at which the first unit was complete."""

    def __init__(self) -> None:
        super().__init__(detect_environment({}))
        self.first: Figures | None = None

    def report_progress(self, figures: dict[str, Any]) -> None:
        """A unit is complete, or a second is over."""
        if self.first is None and figures["units"]:
            self.first = Figures(**figures)


@contextmanager
def source_of(
    sentences: list[str], split_workers: int, per_unit: int
) -> Iterator[tuple[PrepareConfig, list[WorkUnit]]]:
    """A preparation of sentences that has started, with so many of them in a unit: its config and its units."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_source(Path(folder), sentences, split_workers, per_unit)
        out = Path(config.output)
        for name in (*SPLITS, IDS):
            (out / name).mkdir(parents=True)
        source = open_source(config.source)
        (out / SOURCE).write_text(json.dumps(source.index()), encoding="utf-8")
        yield config, [WorkUnit(n, *unit) for n, unit in enumerate(source.units(config.documents_per_shard))]


def reading_only(encoder: Any, sentences: list[str], split_workers: int) -> Measured:
    """Read, split and tokenize units, and drop them; counted from when as many as processes are read."""
    processes = max(1, split_workers)
    per_unit = max(SENTENCES_PER_DOCUMENT, len(sentences) // (8 * processes))
    with source_of(sentences, split_workers, per_unit) as (config, units), closing(Readers(config)) as readers:
        readers.start(encoder)
        futures = [readers.submit(unit) for unit in units]
        warm = [future.result() for future in futures[: min(processes, len(units) // 2)]]
        started = time.perf_counter()
        batches = [batch for future in futures[len(warm) :] for batch in future.result().batches]
        seconds = time.perf_counter() - started
    return Measured(sum(len(batch.rows) for batch in batches), seconds, None, batches)


def all_the_way(encoder: Any, sentences: list[str], split_workers: int) -> Measured:
    """Read, split, tokenize, encode and write units of sentences, as a rank of prepare does."""
    with (
        source_of(sentences, split_workers, unit_size(sentences)) as (config, units),
        closing(Readers(config)) as readers,
    ):
        figures = Figures()
        coordinator = Snapshots()
        end_of_text = encoder.encode([config.end_of_text])[0]
        rank = WorkerContext(config, encoder, end_of_text, None, coordinator, figures)
        encode_units(rank, readers, iter(units))
    first = coordinator.first if coordinator.first and figures.units > 1 else Figures()
    waited = figures.waited - first.waited
    return Measured(figures.encoded - first.encoded, figures.busy - first.busy + waited, waited, [])


def unit_size(sentences: list[str]) -> int:
    """Sentences of a unit all the way: as many as in a preparation, or fewer, so that there are four units."""
    return min(UNIT, max(1, len(sentences) // 4 // SENTENCES_PER_DOCUMENT) * SENTENCES_PER_DOCUMENT)


def write_source(folder: Path, sentences: list[str], split_workers: int, per_unit: int) -> PrepareConfig:
    """A JSONL file of documents, texts if they can be split here and otherwise lists of sentences.

    Args:
        folder: Where it is written.
        sentences: Of the documents.
        split_workers: As in PrepareConfig.
        per_unit: Sentences of a unit.

    Returns:
        The config of its preparation.
    """
    path = folder / "documents.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, first in enumerate(range(0, len(sentences), SENTENCES_PER_DOCUMENT)):
            some = sentences[first : first + SENTENCES_PER_DOCUMENT]
            text = {"text": " ".join(some)} if SPACY else {"given": some[:1], "rest": some[1:] or some}
            file.write(json.dumps({"id": str(number), **text}) + "\n")
    columns = {} if SPACY else {"source_column": "given", "target_column": "rest"}
    return PrepareConfig(
        output=str(folder / "out"),
        source=SourceConfig(name="huggingface", paths=[str(path)], **columns),
        encoder=EncoderConfig(name="sonar", model="random"),
        split_workers=split_workers,
        documents_per_shard=max(1, per_unit // SENTENCES_PER_DOCUMENT),
        validation=0.0,
    )


if __name__ == "__main__":
    main()
