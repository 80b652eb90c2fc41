"""`lcm-ds index`: WebDataset tars of other programs become a dataset; the tars are not moved or changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
from webdataset.shardlists import expand_urls

from lcm_ds.config import validate
from lcm_ds.data.format import DATASET, SHARDS, DatasetInfo, ShardInfo, Supervised, finish, read_info, write_normalizer
from lcm_ds.data.index.records import IndexWriter
from lcm_ds.data.normalizer import Constants, UniformSample, fit
from lcm_ds.data.quantization import BFloat16
from lcm_ds.data.remote import fetch as remote
from lcm_ds.data.shard import Shard, is_apple_double, split_name
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import sha256_of, write_whole
from lcm_ds.languages import unknown_language

THREADS = 4


@dataclass(frozen=True)
class Reading:
    """How the members of the tars are read."""

    extension: str = "npy"
    texts: str = "json:sentences"
    bf16: bool = False
    supervised: Supervised | None = None
    constants: Constants = field(default_factory=Constants)

    def shard(self, file: Path, name: str, embed_dim: int | None, dtype: str | None) -> Shard:
        """The tar in `file`, known as `name`. Raises InputError."""
        storage = BFloat16() if self.bf16 else None
        supervised = self.supervised is not None
        return Shard(file, None, embed_dim, dtype, storage, self.extension, self.texts, name, supervised)


def index(
    shards: str,
    output: str | Path,
    encoder: Mapping[str, Any] | None = None,
    like: str | None = None,
    extension: str = "npy",
    texts: str = "json:sentences",
    bf16: bool = False,
    samples: int = 1_000_000,
    threads: int = THREADS,
    supervised: Supervised | None = None,
) -> None:
    """Write dataset.json, shards.jsonl and the normaliser for existing tars into the folder `output`.

    Every tar is read once, for its checksum, counts and values.

    Args:
        shards: A path or a URL that fsspec opens, with braces for many ("a-{000..099}.tar").
        output: The dataset's folder.
        encoder: The encoder of the concepts.
        like: A dataset of the same encoder, from which encoder, splitter, language and end of text are copied.
        extension: A sample is `<key>.<extension>`, an .npy file of fp16 or fp32 [n, embed_dim]; other members are
            ignored.
        texts: The sentences, if there are any: EXTENSION:FIELD of a JSON object, or EXTENSION of a text with one a
            line.
        bf16: Whether arrays are uint16 holding the bits of bf16.
        samples: How many concepts the normaliser is fitted to.
        threads: Tars read at a time.
        supervised: Set if the JSON of each document has source_sentences and target_sentences.

    Raises:
        InputError: With every error, and nothing written: tars that cannot be read or are incomplete, that disagree
            about embed_dim or dtype, or hold concepts that are not finite; an output that is a dataset already or not
            a folder; `pipe:`, which would run a shell.
    """
    output = Path(output)
    locations = _locations(shards)
    about = _about(encoder, like)
    for name in (DATASET, SHARDS):
        if (output / name).exists():
            raise InputError(f"{output}: is a dataset already; name another folder, or remove its {name} first")
    sample = UniformSample(samples)
    constants = Constants.of(about.get("end_of_text"), supervised)
    reading = Reading(extension.lower(), _checked(texts), bf16, supervised, constants)
    with _folder(output), IndexWriter(output) as records:
        infos, embed_dim, dtype = _read(locations, output, reading, sample, threads, records)
        if embed_dim is None or dtype is None:
            raise InputError(f"{shards}: hold no documents: samples are <key>.{extension}")
        if like is not None and about["embed_dim"] != embed_dim:
            raise InputError(f"{shards}: has embed_dim {embed_dim}, {like} has {about['embed_dim']}")
        center, scale = fit(sample.concepts())
        mapping = {
            **about,
            "embed_dim": embed_dim,
            "dtype": "bfloat16" if bf16 else dtype,
            "extension": reading.extension,
            "texts": reading.texts,
            "supervised": supervised,
            "source": {"name": "index", "shards": shards},
        }
        info = validate(DatasetInfo, mapping, output / DATASET)
        concepts = sum(info.concepts for info in infos)
        statistics = {"samples": min(samples, sample.count), "left_out": constants.names, "concepts": concepts}
        write_normalizer(output, center, scale, statistics)
        lines = sorted(infos, key=lambda info: info.name)
        records.commit()
        write_whole(output / SHARDS, "".join(info.line() + "\n" for info in lines))
        finish(output, info)
    documents = sum(info.documents for info in infos)
    print(f"{output}: {len(infos)} shards, {documents:,} documents, {concepts:,} concepts of {embed_dim} × {dtype}")


def _locations(shards: str) -> list[str]:
    """The paths and URLs of a brace pattern. Raises InputError naming missing files."""
    remote.is_remote(shards)  # refuses pipe:
    try:
        locations = list(dict.fromkeys(expand_urls(shards)))
    except (ValueError, AssertionError) as error:  # braces; variables, which webdataset puts in
        raise InputError(f"{shards}: cannot be expanded: {error}") from None
    errors: list[str] = []
    names: dict[Path, str] = {}
    for location in locations:
        if remote.is_remote(location):
            continue
        if Path(location).is_dir():
            errors.append(f"{location}: is a folder: name its tars, or give it to lcm-ds adopt if it holds other files")
        elif not Path(location).is_file():
            hint = ": a URL has //, as in file:///folder/a.tar" if location.startswith("file:") else ""
            errors.append(f"{location}: no such file{hint}")
        elif (first := names.setdefault(Path(location).resolve(), location)) != location:
            errors.append(f"{location}: is the same file as {first}: name it once")
    if errors:
        raise InputError(errors)
    return locations


def _checked(texts: str) -> str:
    """EXTENSION:FIELD or EXTENSION, the extension in lower case as those of members are. Raises InputError."""
    extension, colon, field = texts.partition(":")
    if not extension or (colon and not field):
        raise InputError(
            f"--texts: {texts!r} has to be EXT:FIELD of a JSON object, or EXT of a text with a sentence a line"
        )
    return f"{extension.lower()}{colon}{field}"


def _about(encoder: Mapping[str, Any] | None, like: str | None) -> dict[str, Any]:
    """The encoder's part of dataset.json."""
    if like is None:
        if (problem := unknown_language(encoder or {})) is not None:
            raise InputError(f"--{problem}")
        return {"encoder": dict(encoder or {"name": "unknown"})}
    if encoder is not None:
        raise InputError("--like and --encoder both say what made the concepts: give one of them")
    other = read_info(like)
    return other.model_dump(include={"encoder", "language", "splitter", "end_of_text", "embed_dim"})


@contextmanager
def _folder(output: Path) -> Iterator[None]:
    """Make the folder; remove it afterwards if it was new and is empty."""
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output}: no such folder can be made: {error.strerror}") from None
    try:
        yield
    finally:
        if made:
            with suppress(OSError):
                output.rmdir()  # fails unless it is empty


def _read(
    locations: Sequence[str],
    output: Path,
    reading: Reading,
    sample: UniformSample,
    threads: int,
    records: IndexWriter,
) -> tuple[list[ShardInfo], int | None, str | None]:
    """Lines for shards.jsonl in order, embed_dim and dtype. Raises InputError with all that is wrong."""
    from rich.console import Console
    from rich.progress import Progress

    kind: tuple[int | None, str | None] = (None, None)
    lock = Lock()

    def read(location: str) -> tuple[Collector, ShardInfo | None, bytes]:
        nonlocal kind
        errors = Collector()
        info: ShardInfo | None = None
        record = b""
        with errors, _open(location, output, reading, *kind) as (shard, listed):
            _check_names(shard, location, reading)
            _check_type(shard, location, reading)
            _scan(shard, location, reading, sample, lock)
            info = listed
            record = shard.index_record()  # raises if a supervised document lacks one of its parts
            if shard.dtype is not None:
                kind = (shard.embed_dim, shard.dtype.name)
        return errors, info, record

    infos: list[ShardInfo] = []
    errors = Collector()
    done = 0

    def add(collected: Collector, info: ShardInfo | None, record: bytes) -> None:
        nonlocal done
        errors.add(collected)
        if info is not None:
            infos.append(replace(info, index=records.add(record, info.documents)))
        done += 1
        progress.advance(task)

    with Progress(transient=True, disable=not Console().is_terminal) as progress, ThreadPoolExecutor(threads) as pool:
        task = progress.add_task("reading", total=len(locations))
        while done < len(locations) and kind == (None, None):  # until one determines embed_dim and dtype
            add(*read(locations[done]))
        for result in pool.map(read, locations[done:]):
            add(*result)
    errors.raise_if_any()
    return infos, *kind


@contextmanager
def _open(
    location: str, output: Path, reading: Reading, embed_dim: int | None, dtype: str | None
) -> Iterator[tuple[Shard, ShardInfo]]:
    """A tar that agrees with the ones before it, and its line for shards.jsonl."""
    if not remote.is_remote(location):
        file = Path(location).resolve()
        name = file.name if file.parent == output.resolve() else str(file)
        yield _listed(reading.shard(file, location, embed_dim, dtype), file, name)
        return
    with TemporaryDirectory(dir=output, prefix="index-") as temporary:
        file = Path(temporary) / "shard.tar"
        sha256, _ = remote.copy(location, file)
        yield _listed(reading.shard(file, location, embed_dim, dtype), file, location, sha256)


def _listed(shard: Shard, file: Path, name: str, sha256: str | None = None) -> tuple[Shard, ShardInfo]:
    size = file.stat().st_size
    return shard, ShardInfo(name, len(shard), int(shard.lengths.sum()), size, sha256 or sha256_of(file))


def _check_names(shard: Shard, location: str, reading: Reading) -> None:
    """Raise InputError if arrays would be left out, because their names have a dot before the extension.

    Further arrays of a document that is read, such as those of another encoder, are left out as asked.
    """
    keys = set(shard.keys)
    lost = [name for name in shard.unread if split_name(name)[0] not in keys and not is_apple_double(name)]
    if lost:
        key, kind = split_name(lost[0])
        meant = f"{kind} of {key}" if kind else "no sample"
        raise InputError(
            f"{location}: {len(lost)} members end in .{reading.extension} and are not read: in WebDataset a key "
            f"ends at the first dot, so that {lost[0]} is {meant}: rename them without dots"
        )


def _check_type(shard: Shard, location: str, reading: Reading) -> None:
    """Raise InputError if the arrays are not of a type for concepts."""
    if shard.dtype is None:
        return
    wanted = (np.uint16,) if reading.bf16 else (np.float16, np.float32)
    if shard.embed_dim == 0 or shard.dtype not in wanted:
        expected = "bf16 kept as uint16" if reading.bf16 else "fp16 or fp32 (bf16 kept as uint16: --bf16)"
        raise InputError(f"{location}: holds {shard.dtype} [n, {shard.embed_dim}]; concepts are {expected}")


def _scan(shard: Shard, location: str, reading: Reading, sample: UniformSample, lock: Lock) -> None:
    """Add the shard's concepts to the sample, and check its texts. Raises InputError for the first error."""
    shard.given  # noqa: B018 (raises if a supervised document lacks one of its parts)
    for document, key in enumerate(shard.keys):
        concepts = shard.concepts(document)
        if not np.isfinite(concepts).all():
            raise InputError(f"{location}: {key}: has a concept that is not finite")
        shard.meta(document)
        positions = np.arange(len(concepts))
        mask = reading.constants.leaves(shard, np.full_like(positions, document), positions)
        with lock:
            sample.add(f"{location}/{key}", concepts, mask)
