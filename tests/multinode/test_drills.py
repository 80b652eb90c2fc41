"""Drills: what goes wrong for a while on a cluster, and is not to end a run."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from host_runs import finish, launch, wait_for, wait_for_step
from small_run import ROOT, checkpoints, losses, run_dir

# The time of day, and so many seconds more as the file says that the variable LEAP names.
LEAPING_CLOCK = """
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long leap(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("LEAP"), "r");
    if (file) {
        if (fscanf(file, "%ld", &seconds) != 1) seconds = 0;
        fclose(file);
    }
    return seconds;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    int code = syscall(SYS_clock_gettime, id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += leap();
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    int code = syscall(SYS_gettimeofday, now, zone);
    now->tv_sec += leap();
    return code;
}
time_t time(time_t *where) {
    time_t now = syscall(SYS_time, NULL) + leap();
    if (where) *where = now;
    return now;
}
"""


@pytest.mark.slow
def test_a_link_with_delay_and_loss_slows_a_run_and_does_not_change_it(hosts, make_config, local_losses):
    config = make_config(deepspeed=str(ROOT / "ds_configs/zero2_fp32.json"))
    with hosts.bad_link(1, delay=0.2, loss=0.05) as link:
        code, out, err = finish(launch(hosts, 2, config), timeout=600)
    assert code == 0, out + err
    assert link.lost > 5
    assert link.carried > link.lost
    assert losses(config) == pytest.approx(local_losses(config), abs=1e-5)


@pytest.mark.slow
def test_two_hosts_lost_at_once_are_left_out(hosts, make_config):
    config = make_config(steps=60, checkpoint={"every": 2}, batch={"rows_per_step": 8, "micro_batch_rows": 1})
    launcher = launch(hosts, 4, config, "--max-restarts", 1, "--min-hosts", 2)
    wait_for_step(launcher, config, 5)
    hosts.kill(1)
    hosts.set_link(2, "down")
    code, out, err = finish(launcher)
    assert code == 0, out + err
    assert "continuing with 2 rank(s) on 2 host(s), without worker-1, worker-2" in err
    assert sorted(losses(config)) == list(range(1, 61))
    assert checkpoints(config)[-1] == 60


@pytest.mark.slow
def test_a_short_cut_a_full_disk_and_a_clock_that_leaps_stop_nothing(hosts, make_config, tmp_path):
    """worker-0's clock leaps by an hour and back, worker-1's /tmp is full, the launcher's host is cut off for 2 s."""
    clock, library, source = tmp_path / "leap", tmp_path / "clock.so", tmp_path / "clock.c"
    clock.write_text("0")
    source.write_text(LEAPING_CLOCK)
    subprocess.run([shutil.which("gcc"), "-shared", "-fPIC", "-o", library, source], check=True)
    hosts.restore(0, environment=f"LD_PRELOAD={library} LEAP={clock}")
    hosts.restore(1, fill_tmp(tmp_path))
    config = make_config(steps=100_000, checkpoint={"every": 50, "keep": 2})
    launcher = launch(hosts, 2, config, on=2)
    wait_for_step(launcher, config, 5)
    (rank_0,) = [pid for pid, command in hosts.processes(0).items() if "-m lcm_ds.train" in command]
    assert str(library) in Path(f"/proc/{rank_0}/maps").read_text()
    for leap in ("3600", "-3600"):
        clock.write_text(leap)
        before = max(losses(config))
        wait_for_step(launcher, config, before + 30)
    hosts.set_link(2, "down")
    before = max(losses(config))
    wait_for(launcher, lambda: max(losses(config)) > before, "a step while the launcher is cut off")
    hosts.set_link(2, "up")
    wait_for_step(launcher, config, max(losses(config)) + 30)
    (run_dir(config) / "STOP").touch()
    code, out, err = finish(launcher)
    assert code == 75, out + err
    found = losses(config)
    assert sorted(found) == list(range(1, max(found) + 1))
    assert checkpoints(config)[-1] == max(found)
    assert not [line for line in err.splitlines() if "lost" in line or "restart" in line]


def fill_tmp(visible):
    """Shell commands after which the folder of temporary files has no room, but all of this test's files are there."""
    temporary = Path(tempfile.gettempdir())
    assert visible.is_relative_to(temporary)
    base = temporary / visible.relative_to(temporary).parts[0]
    keep = {base, *([ROOT] if ROOT.is_relative_to(temporary) else [])}
    aside = [(path, f"/mnt/lcm-ds-{os.getpid()}-{number}") for number, path in enumerate(sorted(keep))]
    commands = ["mount -t tmpfs none /mnt"]
    commands += [f"mkdir {place} && mount --bind {path} {place}" for path, place in aside]
    commands += [f"mount -t tmpfs -o size=256k none {temporary}"]
    commands += [f"mkdir -p {path} && mount --bind {place} {path}" for path, place in aside]
    commands += [f"! dd if=/dev/zero of={temporary}/full bs=4k count=1000 2>/dev/null"]
    return " && ".join(commands)
