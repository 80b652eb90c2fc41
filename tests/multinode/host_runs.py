"""Runs over several hosts: starting them as a user does, and waiting for what they do."""

import time

from machine import patience
from small_run import losses

# Short times, so that a test of them does not take long; the defaults are 10, 15 and 30 seconds.
TIMES = ("--back-off", "1", "--silence", "5", "--grace", "3")


def launch(hosts, count, config, *options, on=0):
    """`lcm-ds launch --hostfile` on the first so many hosts, from one of them or from another."""
    options = ["--hostfile", hosts.hostfile(count), *TIMES, *options]
    return hosts.start(on, "-m", "lcm_ds.cli", "launch", *options, config)


def finish(process, timeout=240):
    """(exit code, stdout, stderr) of a started process."""
    out, err = process.communicate(timeout=patience(timeout))
    return process.returncode, out, err


def wait_for(process, happened, event, seconds=120):
    """Until something has happened, while the process runs."""
    deadline = time.monotonic() + patience(seconds)
    while not happened():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{event}: not within {seconds} s: {process.communicate()}")
        time.sleep(0.1)


def wait_for_step(process, config, step):
    """Until a run has done so many steps."""
    wait_for(process, lambda: max(losses(config), default=0) >= step, f"step {step}")
