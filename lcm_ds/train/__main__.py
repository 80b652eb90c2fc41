"""`python -m lcm_ds.train CONFIG [key=value …]`: a worker, under any launcher; same as `lcm-ds train`."""

from __future__ import annotations

import argparse

from lcm_ds.distributed.environment import add_local_rank
from lcm_ds.processes import exit_with
from lcm_ds.train import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lcm_ds.train", description=__doc__)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    add_local_rank(parser)
    arguments = parser.parse_args()
    exit_with(lambda: main(arguments.config, arguments.overrides))
