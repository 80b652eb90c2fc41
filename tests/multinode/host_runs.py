"""Runs over several hosts: starting them as a user does, waiting for a step, reading what they leave."""

import json
import time
from pathlib import Path

import yaml

# Short times, so that a test of them does not take long; the defaults are 10, 15 and 30 seconds.
TIMES = ("--back-off", "1", "--silence", "5", "--grace", "3")


def launch(hosts, count, config, *options, where=0):
    """`lcm-ds launch --hostfile` on the first so many hosts, from one of them or from another."""
    options = ["--hostfile", hosts.hostfile(count), *TIMES, *options]
    return hosts.start(where, "-m", "lcm_ds.cli", "launch", *options, config)


def finish(process, timeout=240):
    """(exit code, stdout, stderr) of a started process."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def run_dir(config):
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def losses(folder):
    """{steps done: loss} of a run so far."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for(process, happened, what, seconds=120):
    """Until something has happened, while the process runs."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{what}: not within {seconds} s: {process.communicate()}")
        time.sleep(0.1)


def wait_for_step(process, config, step):
    """Until a run has done so many steps."""
    wait_for(process, lambda: max(losses(run_dir(config)), default=0) >= step, f"step {step}")


def checkpoints(config):
    """The steps of a run's complete checkpoints."""
    return sorted(int(path.parent.name[5:]) for path in run_dir(config).glob("checkpoints/step_*/COMPLETE"))
