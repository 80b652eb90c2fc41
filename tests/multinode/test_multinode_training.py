"""Runs on several hosts: the losses of one, stopped and gone on with, ended and started again when hosts are lost."""

import os
import signal
import time

import pytest
from host_runs import finish, launch, wait_for, wait_for_step
from machine import patience
from small_run import EMBED_DIM, ROOT, checkpoints, losses, losses_in, run_dir


def test_two_hosts_stopped_and_gone_on_with_give_the_losses_of_launch_local(hosts, make_config, local_losses):
    config = make_config()
    launcher = launch(hosts, 2, config)
    wait_for_step(launcher, config, 1)
    launcher.send_signal(signal.SIGTERM)
    code, out, err = finish(launcher)
    assert code == 75, out + err
    (stopped_at,) = checkpoints(config)
    assert not (run_dir(config) / "STOP").exists()
    hosts.wait_until_idle(1)
    assert any(line.startswith("worker-0 rank 0: step 1/") for line in out.splitlines())

    code, out, err = finish(launch(hosts, 2, config))
    assert code == 0, out + err
    assert f"step {stopped_at} of 8" in out
    expected = local_losses(config)
    assert sorted(expected) == list(range(1, 9))
    assert losses(config) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_eight_hosts_give_the_losses_of_one_and_start_almost_as_fast(hosts, make_config, local_losses, tmp_path):
    config = make_config(batch={"rows_per_step": 8, "micro_batch_rows": 1})
    seconds, launch_options = {}, {"one-host": ["--local", 8], "eight-hosts": ["--hostfile", hosts.hostfile(8)]}
    for where, options in launch_options.items():
        run, began = tmp_path / where, time.monotonic()
        process = hosts.start(0, "-m", "lcm_ds.cli", "launch", *options, config, f"run_dir={run}")
        wait_for(process, lambda run=run: losses_in(run), "the first step")
        seconds[where] = time.monotonic() - began
        code, out, err = finish(process)
        assert code == 0, out + err
        assert losses_in(run) == pytest.approx(local_losses(config), abs=1e-5)
    print(f"seconds to the first step: {seconds}")
    # 1.5 is the aim (benchmarks/RESULTS.md); other processes disturb one more than the other.
    assert seconds["eight-hosts"] < 2.5 * seconds["one-host"]


def test_workers_end_by_themselves_when_the_launcher_is_killed(hosts, make_config):
    config = make_config(steps=100_000, checkpoint={"every": None})
    launcher = launch(hosts, 2, config)
    wait_for_step(launcher, config, 1)
    launcher.kill()
    launcher.communicate()
    hosts.wait_until_idle(10)
    assert checkpoints(config) == [max(losses(config))]  # they have saved before they ended


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_left_out_and_the_run_goes_on_with_the_others(hosts, make_config):
    config = make_config(steps=60, checkpoint={"every": 2})
    launcher = launch(hosts, 2, config, "--max-restarts", 1, "--min-hosts", 1, on=2)
    wait_for_step(launcher, config, 5)
    cut = time.monotonic()
    hosts.set_link(0, "down")
    # Rank 0 was there. Both sides notice it within the silence, and kill what waits for the other after the grace.
    hosts.wait_until_idle(5 + 3 + 4, [0])
    code, out, err = finish(launcher)
    assert code == 0, out + err
    assert time.monotonic() - cut < patience(120)
    assert "worker-0 is lost: no heartbeat for 5 s" in err
    assert "continuing with 1 rank(s) on 1 host(s), without worker-0" in err
    assert checkpoints(config)[-1] == 60
    assert sorted(losses(config)) == list(range(1, 61))


@pytest.mark.slow
def test_a_host_that_is_killed_is_left_out_until_it_is_back(hosts, make_config):
    config = make_config(steps=100_000, checkpoint={"every": 2})
    launcher = launch(hosts, 2, config, "--max-restarts", 2, "--min-hosts", 1)
    wait_for_step(launcher, config, 3)
    hosts.kill(1)
    log = run_dir(config) / "launch" / "rank-00000.log"
    wait_for(launcher, lambda: log.read_text().count("--- ") == 2, "the second start")
    before = max(losses(config))
    wait_for_step(launcher, config, before + 3)
    hosts.restore(1)
    (rank_0,) = [pid for pid, command in hosts.processes(0).items() if "-m lcm_ds.train" in command]
    os.kill(rank_0, signal.SIGKILL)
    wait_for(launcher, lambda: log.read_text().count("--- ") == 3, "the third start")
    before = max(losses(config))
    wait_for_step(launcher, config, before + 3)
    assert any("-m lcm_ds.train" in command for command in hosts.processes(1).values())
    launcher.send_signal(signal.SIGINT)
    code, out, err = finish(launcher)
    assert code == 75, out + err
    assert "worker-1 is gone" in err
    assert "worker-0 rank 0 was killed by SIGKILL" in err


@pytest.mark.slow
def test_the_host_of_a_slow_rank_is_left_out_at_the_next_restart(hosts, make_config):
    config = make_config(
        steps=100_000,
        checkpoint={"every": 2},
        guard={"straggler": 3, "straggler_steps": 6},
        deepspeed=str(ROOT / "ds_configs/zero2_fp32.json"),
        # Its forward pass takes long enough for a process that runs a tenth of the time to be stopped in it.
        model={"preset": "quickstart", "embed_dim": EMBED_DIM, "hidden_size": 256, "num_hidden_layers": 4},
        batch={"rows_per_step": 32, "micro_batch_rows": 16},
    )
    options = ("--max-restarts", 1, "--min-hosts", 1, "--exclude-stragglers")
    launcher = launch(hosts, 2, config, *options)
    wait_for_step(launcher, config, 3)
    (rank_0,), (rank_1,) = (
        [pid for pid, command in hosts.processes(number).items() if "-m lcm_ds.train" in command] for number in (0, 1)
    )

    def slowed():
        for number, seconds in 20 * ((signal.SIGSTOP, 0.1), (signal.SIGCONT, 0.01)):
            os.kill(rank_1, number)
            time.sleep(seconds)
        return (run_dir(config) / "stragglers.jsonl").exists()

    wait_for(launcher, slowed, "a straggler")
    os.kill(rank_0, signal.SIGKILL)
    wait_for_step(launcher, config, max(losses(config)) + 3)
    launcher.send_signal(signal.SIGINT)
    code, out, err = finish(launcher)
    assert code == 75, out + err
    assert "rank 1 on " in out + err
    assert "continuing with 1 rank(s) on 1 host(s), without worker-1" in err


@pytest.mark.slow
def test_a_run_is_not_started_again_on_fewer_hosts_than_it_may_have(hosts, make_config):
    config = make_config(steps=100_000, checkpoint={"every": 2})
    launcher = launch(hosts, 2, config, "--max-restarts", 1)
    wait_for_step(launcher, config, 3)
    hosts.kill(1)
    code, _, err = finish(launcher)
    assert code == 1, err
    assert err.splitlines()[-1] == "lcm-ds launch: 1 of 2 hosts are fit: a restart needs 2"


@pytest.mark.slow
def test_deepspeeds_own_launcher_starts_the_same_workers(hosts, make_config, tmp_path):
    config = make_config(steps=2, optim={"lr": 2.0e-3})
    (tmp_path / "environment").write_text("DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\n")
    deepspeed = (
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        hosts.hostfile(2),
        "--master_addr",
        hosts.addresses[0],
    )
    code, out, err = finish(
        hosts.start(0, *deepspeed, "--module", "lcm_ds.train", config, DS_ENV_FILE=str(tmp_path / "environment"))
    )
    assert code == 0, out + err
    assert checkpoints(config) == [2]
