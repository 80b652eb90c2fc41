"""Preparation: text → dataset, in any number of processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lcm_ds.errors import InputError, PeerFailed
from lcm_ds.signals import DONE, STOPPED
from lcm_ds.terminal import hide_warnings

if TYPE_CHECKING:
    from lcm_ds.config import PrepareConfig


def main(
    config_path: str, overrides: Sequence[str] = (), prepare: Callable[[PrepareConfig], None] | None = None
) -> int:
    """Run one rank of a preparation, or all of it if no launcher started this process.

    Args:
        config_path: A YAML file, or "-" for standard input.
        overrides: key=value.
        prepare: Instead of `lcm_ds.prepare.pipeline.prepare`.

    Returns:
        The exit code; 75 after a stop signal, with all committed units kept.
    """
    from lcm_ds.config import PrepareConfig, load

    path = "/dev/stdin" if config_path == "-" else config_path
    return run(lambda: load(PrepareConfig, path, overrides), prepare)


def run(read_config: Callable[[], PrepareConfig], prepare: Callable[[PrepareConfig], None] | None = None) -> int:
    """`main` with a config that a function returns."""
    # When one rank closes its connections, libraries in the others would print their stacks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    hide_warnings()
    from lcm_ds.distributed.environment import detect_environment, exit_with_launcher

    exit_with_launcher(os.environ)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    try:
        config = read_config()
        if detect_environment(os.environ).rank == 0:
            print(_first_line(config), flush=True)
        if prepare is None:
            from lcm_ds.prepare import pipeline  # imports torch, which takes seconds

            prepare = pipeline.prepare
        prepare(config)
        return DONE
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except PeerFailed as error:
        if error.message:
            print(error.message, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted: finished units are kept; start again to resume", file=sys.stderr)
        return STOPPED


def _first_line(config: PrepareConfig) -> str:
    """What is about to start, before anything that takes time."""
    source = config.source
    texts = source.dataset or ", ".join(source.paths) or source.name
    encoder = "concepts that exist" if config.encoder is None else f"{config.encoder.name} {config.encoder.model}"
    return f"{config.output}: start-up: {encoder}, source {texts}"
