"""What makes a host unfit for a run, which hosts continue after a failure, and which error is reported."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from machine import patience

from lcm_ds.launcher.multihost import protocol
from lcm_ds.launcher.multihost.output import MAX_ERROR_LINES, MAX_QUEUED_LINES, OutputPrinter, StderrTail
from lcm_ds.launcher.multihost.preflight import HostReport, problems_of
from lcm_ds.launcher.multihost.probe import address_and_interface, devices, port_is_free, versions
from lcm_ds.launcher.multihost.restarts import _Launch, fitting_hosts
from lcm_ds.launcher.task import LaunchOptions, LaunchTask

TASK = LaunchTask("lcm_ds.train", folder=Path("/shared/run"), data={"fingerprint": "aa"}, checkpoint_bytes=2**30)


def host(**differs):
    """A host with two devices without problems, except for what differs."""
    report = {
        "versions": versions(),
        "devices": ["cuda", 2],
        "free": 2**31,
        "data": {"fingerprint": "aa"},
        "time": 1000.0,
        **differs,
    }
    return HostReport("worker-1", [], report, received=1000.0)


def test_a_host_on_which_all_is_well_has_no_problem():
    assert problems_of(host(), [0, 1], TASK) == []


@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        ({"versions": {**versions(), "torch": "1.0"}}, "torch: 1.0 there"),
        ({"versions": {**versions(), "python": "3.9.0"}}, "python: 3.9.0 there"),
        ({"versions": {**versions(), "lcm-ds": "0.1.0 (00000000)"}}, "lcm-ds: 0.1.0 (00000000) there"),
        ({"devices": ["cuda", 1]}, "slots: device 1 is requested, but the host has 1 cuda device(s)"),
        ({"time": 1011.0}, "clock: +11 s"),
        ({"time": 989.0}, "clock: -11 s"),
        ({"free": 2**29}, "disk: /shared/run: 0.5 GiB are free, but a checkpoint takes about 1 GiB"),
        (
            {"data": {"fingerprint": "bb"}},
            "data: the datasets of the config differ (fingerprint bb",
        ),
    ],
)
def test_a_host_that_differs_is_told_with_both_values(differs, expected):
    (line,) = problems_of(host(**differs), [0, 1], TASK)
    assert line.startswith(expected)


def test_a_cpu_takes_as_many_ranks_as_one_likes():
    assert problems_of(host(devices=["cpu", None]), list(range(8)), TASK) == []


def test_a_port_that_somebody_listens_on_is_not_free():
    with protocol._listen_on_free_port() as listener:
        assert not port_is_free(listener.getsockname()[1])


def test_hosts_that_look_at_the_same_moment_do_not_find_each_other():
    """Two names of one machine."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", 0))
        assert port_is_free(other.getsockname()[1])


def test_the_way_to_this_host_itself_is_no_way_to_another():
    assert address_and_interface(["127.0.0.1", "127.0.0.2"]) == ("127.0.0.1", None)


def test_as_many_hosts_go_on_as_can_share_the_rows():
    def divides(ranks):  # 24 rows, one a micro-batch
        return 24 % ranks == 0

    assert fitting_hosts([1] * 4, divides, 1) == 4
    assert fitting_hosts([1] * 5, divides, 1) == 4
    assert fitting_hosts([2] * 5, divides, 4) == 4
    assert fitting_hosts([1] * 5, divides, 5) == 0
    assert fitting_hosts([1] * 3, divides, 4) == 0
    assert fitting_hosts([8, 4, 4], divides, 1) == 1 + 1  # 16 ranks cannot, 12 can
    assert fitting_hosts([], divides, 1) == 0


def test_the_wait_before_a_restart_grows_only_while_too_few_hosts_are_fit(tmp_path):
    waited, came_to = [], iter(range(9))

    class Signals:
        async def sleep(self, seconds):
            waited.append(seconds)

    task = LaunchTask("toy_worker", tmp_path, progress=lambda: next(came_to))
    printer = OutputPrinter()
    options = LaunchOptions(max_restarts=9, back_off=100, silence=1)
    launch = _Launch(task, tmp_path, {}, "hosts", options, printer, Signals(), None)

    async def starts():
        for ran in (True, True, False, False, False, True, True):
            assert not ran or await launch.made_progress()
            await launch.back_off()

    asyncio.run(starts())
    printer.close()
    assert waited == [100, 100, 200, 300, 300, 100, 100]


# --- the connection ---------------------------------------------------------------------------------------------------


def test_only_who_has_the_token_is_heard_and_who_falls_silent_is_dead():
    heard = []

    async def serve(number, reader, writer):
        try:
            while (message := await protocol.read(reader, 0.5)) is not None:
                heard.append((number, message))
        except protocol.PeerTimeout:
            heard.append((number, "silent"))

    async def talk():
        async with protocol.Listener() as listener:
            listener.expect("right", serve)
            with pytest.raises(ConnectionError, match="not this launcher"):
                await asyncio.to_thread(protocol.connect, ["127.0.0.1"], listener.port, "wrong", 1)
            sock = await asyncio.to_thread(protocol.connect, ["127.0.0.1"], listener.port, "right", 3)
            _, writer = await asyncio.open_connection(sock=sock)
            beating = asyncio.create_task(protocol.send_heartbeats(writer, 0.5))
            await asyncio.sleep(0.8)  # alive, though it says nothing
            protocol.write(writer, {"rank": 0})
            await asyncio.sleep(0.1)
            assert heard == [(3, {"rank": 0})]
            beating.cancel()
            await asyncio.sleep(0.8)
            writer.close()

    asyncio.run(talk())
    assert heard == [(3, {"rank": 0}), (3, "silent")]


# --- the screen -------------------------------------------------------------------------------------------------------


def test_nobody_waits_for_a_terminal_that_stands_still_and_what_is_left_out_is_said(monkeypatch):
    goes_on, printed = threading.Event(), []

    class Terminal:
        def write(self, text):
            goes_on.wait()
            printed.append(text)

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    screen = OutputPrinter()
    started = time.monotonic()
    for number in range(MAX_QUEUED_LINES + 100):
        screen.say(f"line {number}")
    assert time.monotonic() - started < patience(5)
    goes_on.set()
    time.sleep(0.5)
    screen.say("the last one")
    screen.close()
    text = "".join(printed)
    assert "line 0\n" in text
    assert "lines are only in the logs" in text
    assert text.endswith("the last one\n")


TRACEBACK = ["Traceback (most recent call last):", *["  File x, line 1, in f", "    f()"] * 20, "ValueError: no"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a warning", "config.yaml: noise_std: wrong"], ["a warning", "config.yaml: noise_std: wrong"]),
        (["a warning", "ERROR: it ends", "later"], ["ERROR: it ends", "later"]),
        (["w", *TRACEBACK, "later"], [TRACEBACK[0], "  …", *TRACEBACK[-(MAX_ERROR_LINES - 2) :]]),
        (["w", *TRACEBACK[:3], "ValueError: no", *TRACEBACK], [*TRACEBACK[:3], "ValueError: no"]),
    ],
)
def test_of_what_a_rank_said_the_first_error_is_told(lines, expected):
    errors = StderrTail()
    for line in lines:
        errors.add(line)
    assert errors.first_error() == expected


def test_a_host_without_accelerators_is_asked_without_torch():
    code = (
        "import sys; from lcm_ds.launcher.multihost.probe import probe\n"
        "report = probe('-', 0); print(report['devices'], report['problems'], 'torch' in sys.modules)"
    )
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "('cpu', None) [] False"


def test_an_accelerator_that_is_asked_for_and_not_there_is_none_of_its_kind(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    device = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 0)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: device)
    assert devices() == ("cuda", 0)
