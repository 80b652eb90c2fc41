"""`python -m lcm_ds.evaluate RUN …`: a rank, under any launcher. The same as `lcm-ds evaluate`."""

from __future__ import annotations

import argparse

from lcm_ds.evaluate import add_arguments, main
from lcm_ds.processes import exit_with

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lcm_ds.evaluate", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help="given by DeepSpeed's launcher; LOCAL_RANK says the same")
    arguments = parser.parse_args()
    exit_with(lambda: main(arguments))
