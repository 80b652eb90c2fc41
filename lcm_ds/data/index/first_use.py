"""The index of a dataset that has none yet: made on first use, for datasets of earlier versions."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lcm_ds.config import DataConfig
from lcm_ds.data.format import SHARDS, Dataset, ShardInfo, finish, open_dataset, read_index, read_shards
from lcm_ds.data.index.records import INDEX, DocumentIndex, IndexWriter
from lcm_ds.data.remote import fetch as remote
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.shard import open_shard_once
from lcm_ds.errors import InputError
from lcm_ds.files import OpenFile, lock, why_not_writable, write_whole

logger = logging.getLogger(__name__)

THREADS = 4


def open_for_run(path: str, data: DataConfig, sizes: bool = True) -> Dataset:
    """The dataset at `path`, opened with the settings of a run's `data` block, and indexed.

    Args:
        path: A folder or URL.
        data: The settings.
        sizes: As in `open_dataset`.

    Raises:
        InputError: As `open_dataset`, or `indexed`.
    """
    cache = Cache.of(data.cache_dir, data.cache_gb)
    skip = data.on_bad_shard == "skip"
    return indexed(open_dataset(path, cache, data.verify == "always", sizes, skip))


def indexed(dataset: Dataset) -> Dataset:
    """The dataset with its index: fetched if it is remote, and made if it has none.

    To make it every shard is read once, compared with its sha256. It is kept in the dataset's folder, or if that is
    remote or cannot be written to, in the cache's; without a cache in a temporary folder, for as long as this process
    needs it. Of several processes on a file system one makes it, and the others wait.

    Raises:
        InputError: A shard cannot be read, or the index is damaged.
    """
    if dataset.index is not None:
        return dataset
    if not remote.is_remote(dataset.path) and why_not_writable(dataset.path) is None:
        return _kept(dataset, Path(dataset.path))
    if dataset.cache is not None:
        return _kept(dataset, Path(dataset.cache.folder) / f"index-{dataset.fingerprint}")
    with TemporaryDirectory(prefix="lcm-ds-index-") as temporary:  # the file stays readable when its name is gone
        return _made(dataset, Path(temporary))


def _kept(dataset: Dataset, folder: Path) -> Dataset:
    """The dataset with the index in `folder`, which is fetched or made if there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"data.cache_dir: {folder.parent}: cannot be used: {error.strerror}") from None
    with _locked(folder):
        shards = read_shards(folder)
        same = [shard.identity() for shard in shards] == [shard.identity() for shard in dataset.shards]
        if same and (index := read_index(str(folder), shards)) is not None:
            return replace(dataset, shards=tuple(shards), index=index)
        listed = dataset.info.index
        if listed is not None and remote.is_remote(dataset.path):
            partial = folder / f"{INDEX}.partial"
            remote.copy(remote.join(dataset.path, INDEX), partial, listed.sha256, listed.bytes)
            os.replace(partial, folder / INDEX)
            made = replace(dataset, index=DocumentIndex(OpenFile(folder / INDEX), dataset.shards))
        else:
            made = _made(dataset, folder)
        write_whole(folder / SHARDS, "".join(shard.line() + "\n" for shard in made.shards))
        if folder == Path(dataset.path):
            finish(folder, dataset.info)  # which lists the index, for those who fetch it
        return made


def _made(dataset: Dataset, folder: Path) -> Dataset:
    """The dataset with an index that is made in `folder`."""
    logger.warning(
        "%s: has no %s yet, for it was made by an earlier version: %d shards are read once to make it, in %s",
        dataset.path,
        INDEX,
        len(dataset.shards),
        folder,
    )
    checked = replace(dataset, checksums=True)
    shards: list[ShardInfo] = []
    with IndexWriter(folder) as writer, ThreadPoolExecutor(THREADS) as pool:
        records = pool.map(lambda index: open_shard_once(checked, index).index_record(), range(len(dataset.shards)))
        for shard, record in zip(dataset.shards, records, strict=True):
            shards.append(replace(shard, index=writer.add(record, shard.documents), lengths=None, given=None))
        writer.commit()
    return replace(dataset, shards=tuple(shards), index=DocumentIndex(OpenFile(folder / INDEX), shards))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process makes an index in the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, fcntl.LOCK_EX, folder)  # without locks two may make it, and the last one's is kept
        yield
    finally:
        os.close(descriptor)
