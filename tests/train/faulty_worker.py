"""A worker of a real run with a fault.

python faulty_worker.py CONFIG FAULT: `nan:RANK:STEP` puts a NaN into a target of that rank at that step, each time it
is read; `hang:RANK:STEP` makes that rank hang there.
"""

import os
import sys
import time

import torch

from lcm_ds.data.loader import Loader
from lcm_ds.processes import exit_with
from lcm_ds.train import main

read = Loader.read


def read_with(kind, step):
    def faulty(loader, at, index):
        batch = read(loader, at, index)
        if at == step and index == 0:
            if kind == "hang":
                time.sleep(1000)
            row, column = (batch.segment_ids == 0).nonzero()[1].tolist()
            batch.concepts[row, column, 0] = torch.nan
        return batch

    return faulty


if __name__ == "__main__":
    config, fault = sys.argv[1:]
    kind, rank, step = fault.split(":")
    if os.environ["RANK"] == rank:
        Loader.read = read_with(kind, int(step))
    exit_with(lambda: main(config))
