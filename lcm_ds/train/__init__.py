"""Training: the engine, the loop, checkpoints, metrics."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lcm_ds.errors import InputError


def main(config_path: str, overrides: Sequence[str] = ()) -> int:
    """A worker of a run, from the environment its launcher set; returns the exit code (DESIGN: Contract 4)."""
    from lcm_ds.train.place import read_place

    speaks = True
    try:
        place = read_place(os.environ)
        speaks = place.local_rank == 0  # one process a host says what is wrong
        from lcm_ds import ds_config
        from lcm_ds.train.check import check
        from lcm_ds.train.loop import train

        job = check(config_path, overrides, place.world_size)
        ds_config.check_device(job.ds, config_path)
        return train(job, place)
    except InputError as error:
        if speaks:
            print(error, file=sys.stderr)
        return 2
