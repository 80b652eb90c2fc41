"""Training: the engine, the loop, checkpoints, metrics."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from lcm_ds.errors import InputError, RunFailedError
from lcm_ds.signals import DONE, STOPPED, USER_ERROR


def main(config_path: str, overrides: Sequence[str] = (), dry_run: bool = False, ranks: int | None = None) -> int:
    """A worker of a run, from the environment its launcher set; returns the exit code (DESIGN: Contract 4).

    dry_run: only say what the run would be, on as many `ranks` (default: those of the environment).
    """
    from lcm_ds.distributed.environment import detect_environment, exit_with_launcher
    from lcm_ds.train.monitoring.console import console
    from lcm_ds.train.reliability.stop_signal import StopRequest

    if not dry_run:
        exit_with_launcher(os.environ)
    console.redirect()  # imports have much to say, too
    speaks, code = True, 1
    stop = None if dry_run else StopRequest()  # from now on: the imports below take seconds
    try:
        place = detect_environment(os.environ)
        speaks = place.local_rank == 0  # one process a host says what is wrong
        from lcm_ds import deepspeed_config
        from lcm_ds.train.job_builder import build_job

        job = build_job(config_path, overrides, ranks or place.world_size)
        if stop is None:
            from lcm_ds.train.dry_run import dry_run as say

            console.restore()
            if place.rank == 0:
                say(job, ranks or place.world_size)
            return 0
        deepspeed_config.check_device(job.ds, config_path)
        from lcm_ds.train.loop import train

        speaks = True  # from here on a mistake is known to the rank that finds it
        code = train(job, place, stop)
    except RunFailedError as error:  # of all ranks alike
        if place.rank == 0:
            logging.getLogger("lcm_ds.train").error("%s", error)
        code = error.exit_code
    except InputError as error:
        if speaks and error.errors:
            console.error(str(error))
        code = error.exit_code
    except Exception:
        # To RUN/log.txt as well, once it is there; the others are ended by whoever started them.
        logging.getLogger("lcm_ds.train").exception("this process ends with an error")
    finally:
        if stop is not None:
            stop.close()
        console.restore(show=code not in (DONE, USER_ERROR, STOPPED))
    return code
