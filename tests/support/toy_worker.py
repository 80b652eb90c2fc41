"""A worker with given behaviour; run as `python -m toy_worker DEEDS FOLDER`, or with a config, as DeepSpeed does.

DEEDS is a list of RANK=DEED, other ranks sleep: exit:CODE, kill (itself), stop (75 on a signal, after a moment),
obey (75 when the file FOLDER/run/STOP appears), deaf (to SIGTERM), spawn (a child that sleeps, then sleep), raise (an
error), advance (leave one more file FOLDER/progress-N, then exit 1).
Each rank leaves a file FOLDER/RANK with its state.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lcm_ds.distributed.environment import detect_environment


def main(deeds, folder):
    env = detect_environment(os.environ)
    deed, _, argument = dict(part.split("=") for part in deeds.split(",")).get(str(env.rank), "sleep").partition(":")
    folder = Path(folder)
    pids = [os.getpid()]
    if deed == "stop":

        def stop(number, frame):
            time.sleep(0.3)  # a checkpoint takes a while
            (folder / f"stopped-{env.rank}").write_text(signal.Signals(number).name)
            sys.exit(75)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
    elif deed == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif deed == "spawn":
        pids.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]).pid)
    write_state(folder, env, pids)
    if deed == "exit":
        wait_for_all(folder, env)
        print(f"rank {env.rank} of {env.world_size} says goodbye", flush=True)
        sys.exit(int(argument))
    if deed == "kill":
        wait_for_all(folder, env)
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "obey":
        while not (folder / "run" / "STOP").exists():
            time.sleep(0.01)
        (folder / "obeyed").touch()
        sys.exit(75)
    if deed == "raise":
        wait_for_all(folder, env)
        raise ValueError("the wrong number")
    if deed == "advance":
        wait_for_all(folder, env)
        (folder / f"progress-{len(list(folder.glob('progress-*')))}").touch()
        sys.exit(1)
    time.sleep(100)


def write_state(folder, env, pids):
    partial = folder / f"{env.rank}.partial"
    threads = os.environ.get("OMP_NUM_THREADS")
    variables = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    state = {"pids": pids, "place": env.environment(), "threads": threads, "variables": variables}
    partial.write_text(json.dumps(state))
    partial.rename(folder / str(env.rank))


def wait_for_all(folder, env):
    while not all((folder / str(rank)).exists() for rank in range(env.world_size)):
        time.sleep(0.01)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if words[0].endswith(".yaml"):  # a config that holds the deeds
        words = Path(words[0]).read_text().split()
    main(*words)
