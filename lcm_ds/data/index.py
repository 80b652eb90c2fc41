"""`lcm-ds index`: WebDataset tars made elsewhere become a dataset; they stay where and as they are."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from webdataset.shardlists import expand_urls

from lcm_ds.config import validate
from lcm_ds.data import remote
from lcm_ds.data.format import DATASET, SHARDS, DatasetInfo, ShardInfo, finish, write_normalizer
from lcm_ds.data.normalizer import UniformSample, fit
from lcm_ds.data.reader import Shard
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import sha256_of, write_whole


def index(shards: str, output: str | Path, encoder: dict[str, Any] | None = None, samples: int = 250_000) -> None:
    """Write dataset.json, shards.jsonl and the normaliser for existing tars into the folder `output`.

    shards: a path or a URL that fsspec opens, braces for many ("a-{000..099}.tar"). A sample of them is `<key>.npy`,
    fp16 or fp32 [n, embed_dim], and may have a `<key>.json`. encoder: what made the concepts, if known. samples: how
    many concepts the normaliser is fitted on. Every tar is read once, whole: for its checksum and counts.
    Raises InputError with every mistake: tars that cannot be read or are not whole, that disagree about embed_dim or
    dtype, or hold concepts that are not finite; an output that is a dataset already; `pipe:`, which would run a shell.
    """
    output = Path(output)
    places = _places(shards)
    if (output / DATASET).exists():
        raise InputError(f"{output}: is a dataset already; name another folder, or remove its {DATASET} first")
    output.mkdir(parents=True, exist_ok=True)
    sample = UniformSample(samples)
    infos: list[ShardInfo] = []
    embed_dim: int | None = None
    dtype: str | None = None
    mistakes = Collector()
    for place in places:
        with mistakes, TemporaryDirectory(dir=output, prefix="index-") as temporary:
            shard, info = _open(place, output, Path(temporary), embed_dim, dtype)
            if shard.embed_dim is not None and shard.dtype is not None:
                if shard.embed_dim == 0 or shard.dtype not in (np.float16, np.float32):
                    raise InputError(f"{place}: holds {shard.dtype} [n, {shard.embed_dim}]; concepts are fp16 or fp32")
                embed_dim, dtype = shard.embed_dim, shard.dtype.name
            _scan(shard, place, sample)
            infos.append(info)
    mistakes.raise_if_any()
    if embed_dim is None or dtype is None:
        raise InputError(f"{shards}: hold no documents: samples are <key>.npy")
    center, scale = fit(sample.concepts())
    write_normalizer(output, center, scale, {"samples": min(samples, sample.count), "concepts": sample.count})
    write_whole(output / SHARDS, "".join(info.line() + "\n" for info in sorted(infos, key=lambda info: info.name)))
    source = {"name": "index", "shards": shards}
    mapping = {"encoder": encoder or {"name": "unknown"}, "embed_dim": embed_dim, "dtype": dtype, "source": source}
    finish(output, validate(DatasetInfo, mapping, output / DATASET))
    documents = sum(info.documents for info in infos)
    print(f"{output}: {len(infos)} shards, {documents:,} documents, {sample.count:,} concepts of {embed_dim} × {dtype}")


def _places(shards: str) -> list[str]:
    """The paths and URLs that a brace pattern stands for. Raises InputError naming those that are not there."""
    remote.is_remote(shards)  # refuses pipe:
    places = list(dict.fromkeys(expand_urls(shards)))
    missing = [place for place in places if not remote.is_remote(place) and not Path(place).is_file()]
    if missing:
        raise InputError([f"{place}: no such file" for place in missing])
    return places


def _open(
    place: str, output: Path, temporary: Path, embed_dim: int | None, dtype: str | None
) -> tuple[Shard, ShardInfo]:
    """A tar that agrees with the ones before it, and its line for shards.jsonl."""
    if remote.is_remote(place):
        file, name = temporary / "shard.tar", place
        sha256, _ = remote.download(place, file)
    else:
        file = Path(place).resolve()
        name = file.name if file.parent == output.resolve() else str(file)
        sha256 = sha256_of(file)
    shard = Shard(file, None, embed_dim, dtype)
    return shard, ShardInfo(name, len(shard), int(shard.lengths.sum()), file.stat().st_size, sha256)


def _scan(shard: Shard, place: str, sample: UniformSample) -> None:
    """Put the shard's concepts to the sample. Raises InputError for the first that is not finite."""
    for document, key in enumerate(shard.keys):
        concepts = shard.concepts(document)
        if not np.isfinite(concepts).all():
            raise InputError(f"{place}: {key}: has a concept that is not finite")
        sample.add(f"{place}/{key}", concepts)
