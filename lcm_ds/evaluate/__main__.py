"""`python -m lcm_ds.evaluate RUN …`: one rank of `lcm-ds evaluate`, under any launcher."""

from __future__ import annotations

import argparse

from lcm_ds.distributed.environment import add_local_rank
from lcm_ds.evaluate import add_arguments, main
from lcm_ds.processes import exit_with

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lcm_ds.evaluate", description=__doc__)
    add_arguments(parser)
    add_local_rank(parser)
    arguments = parser.parse_args()
    exit_with(lambda: main(arguments))
