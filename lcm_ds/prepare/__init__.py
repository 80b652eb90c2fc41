"""Preparation: text → dataset, in any number of processes; `inspect`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from lcm_ds.errors import InputError
from lcm_ds.terminal import hide_warnings

STOPPED = 75


def main(config_path: str, overrides: Sequence[str] = ()) -> int:
    """A rank of a preparation, or all of it where no launcher started this process; returns the exit code.

    config_path: a YAML file, or "-" for one on standard input. Signals that ask for an end are answered with 75: what
    is committed is kept.
    """
    # A rank that ends closes its connections, about which the others' libraries print whole stacks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    hide_warnings()
    from lcm_ds.config import PrepareConfig, load
    from lcm_ds.distributed.environment import exit_with_launcher
    from lcm_ds.prepare.coordinator import PeerFailed
    from lcm_ds.prepare.pipeline import prepare

    exit_with_launcher(os.environ)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _interrupt)
    try:
        prepare(load(PrepareConfig, "/dev/stdin" if config_path == "-" else config_path, overrides))
        return 0
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except PeerFailed as error:
        if error.message:
            print(error.message, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept, start again to go on", file=sys.stderr)
        return STOPPED


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
