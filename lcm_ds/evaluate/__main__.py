"""`python -m lcm_ds.evaluate RUN …`: one rank of `lcm-ds evaluate`, under any launcher."""

from __future__ import annotations

import argparse

from lcm_ds.evaluate import add_arguments, main
from lcm_ds.processes import exit_with

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lcm_ds.evaluate", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher; the same as LOCAL_RANK")
    arguments = parser.parse_args()
    exit_with(lambda: main(arguments))
