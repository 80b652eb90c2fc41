"""Training: from a config to a trained model. README.md in this folder is the way in."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from lcm_ds.errors import InputError, RunFailedError
from lcm_ds.signals import DONE, STOPPED, USER_ERROR


def main(config_path: str, overrides: Sequence[str] = ()) -> int:
    """Run one worker of a training run, with the environment that its launcher set.

    Args:
        config_path: A train config.
        overrides: `key=value` with dotted keys.

    Returns:
        The exit code.
    """
    from lcm_ds.distributed.environment import detect_environment, exit_with_launcher
    from lcm_ds.train.monitoring.console import console
    from lcm_ds.train.reliability.stop_signal import StopRequest

    exit_with_launcher(os.environ)
    console.redirect()  # imports print, too
    prints_errors, code = True, 1
    stop = StopRequest()  # before the imports below, which take seconds
    try:
        env = detect_environment(os.environ)
        prints_errors = env.local_rank == 0  # every rank finds the errors below; one per host prints them
        from lcm_ds.train.job_builder import build_job

        job = build_job(config_path, overrides, env.world_size, sizes=env.rank == 0)
        if job.config.train.deterministic:
            from lcm_ds.train.engine import make_deterministic

            make_deterministic()
        job.check_device()
        from lcm_ds.train.loop import train

        prints_errors = True  # from here on only the rank that finds an error knows it
        code = train(job, env, stop)
    except RunFailedError as error:  # raised by all ranks
        if env.rank == 0:
            logging.getLogger("lcm_ds.train").error("%s", error)
        code = error.exit_code
    except InputError as error:
        if prints_errors and error.errors:
            console.error(str(error))
        code = error.exit_code
    except Exception:
        # Also into RUN/log.txt, once that is open; the launcher ends the other ranks.
        logging.getLogger("lcm_ds.train").exception("this process ends with an error")
    finally:
        stop.close()
        console.restore(show=code not in (DONE, USER_ERROR, STOPPED))
    return code
