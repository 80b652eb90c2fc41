"""`python -m lcm_ds.prepare CONFIG [key=value …]`: one rank, under any launcher; the same as `lcm-ds prepare`."""

from __future__ import annotations

import argparse

from lcm_ds.distributed.environment import add_local_rank
from lcm_ds.prepare import main
from lcm_ds.processes import exit_with

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lcm_ds.prepare", description=__doc__)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    add_local_rank(parser)
    arguments = parser.parse_args()
    exit_with(lambda: main(arguments.config, arguments.overrides))
