"""A rank that reads a dataset at a URL through a cache: cache_worker.py URL CACHE RANK WORLD_SIZE OUT."""

import sys
from pathlib import Path

import numpy as np

from lcm_ds.data.format import open_dataset
from lcm_ds.data.index.first_use import indexed
from lcm_ds.data.loader import Loader
from lcm_ds.data.plan import Plan
from lcm_ds.data.remote import cache
from lcm_ds.data.remote import fetch as remote
from lcm_ds.data.supervised import source_of
from lcm_ds.errors import InputError

ROWS, LENGTH, MAX_SEGMENT = 8, 16, 8


def main(url: str, folder: str, rank: str, world_size: str, out: str) -> int:
    remote.FIRST_PAUSE = 0.01
    cache.FREE_SHARE = 0.0  # however full this machine's disk is
    dataset = indexed(open_dataset(url, cache.Cache(folder)))
    plan = Plan([source_of(dataset, LENGTH, MAX_SEGMENT, shuffle_shards=2)], 0, ROWS, LENGTH, epochs=1)
    try:
        loader = Loader([dataset], plan, int(rank), int(world_size), 2, workers=2)
        np.save(Path(out), np.concatenate([batch.concepts.numpy().copy() for batch in loader]))
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        loader.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
