"""Hosts on one machine: a network namespace each, on one bridge, with an address, names for the others and an sshd."""

import contextlib
import fcntl
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from machine import patience
from started import Started

ROOT = Path(__file__).parent.parent.parent
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin")
PREFIX = "lcmds"


def why_not():
    """What is missing for hosts on this machine, or None."""
    missing = [name for name, path in (("iproute2", IP), ("openssh-server", SSHD)) if path is None]
    missing += ["pdsh"] if shutil.which("pdsh") is None else []
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if missing:
        return f"needs the packages {', '.join(missing)} (make test-multinode installs them)"
    name = f"{PREFIX}-{os.getpid()}-try"
    if subprocess.run([IP, "netns", "add", name], capture_output=True).returncode != 0:
        return "network namespaces cannot be made here"
    subprocess.run([IP, "netns", "del", name], check=True)
    return None


def ip(*words, check=True):
    done = subprocess.run([IP, *map(str, words)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


class Hosts:
    """worker-0 … worker-N, made when it is entered and gone without a trace when it is left."""

    def __init__(self, folder, count):
        self.folder, self.count = folder, count
        self.names = [f"worker-{number}" for number in range(count)]
        self.addresses = [f"10.213.7.{10 + number}" for number in range(count)]
        self.bridge = f"{PREFIX}{os.getpid()}"
        self.servers = {}

    def __enter__(self):
        remove_leftovers()
        self._make_ssh()
        try:
            ip("link", "add", self.bridge, "type", "bridge")
            ip("link", "set", self.bridge, "up")
            for number in range(self.count):
                self._make(number)
            for number in range(self.count):
                self.restore(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        for number in range(self.count):
            self.kill(number)
        for server in self.servers.values():
            server.wait()
        for number in range(self.count):
            _remove(self.namespace(number))
        _remove_links(self.bridge)

    def namespace(self, number):
        return f"{PREFIX}-{os.getpid()}-{number}"

    def _make(self, number):
        namespace = self.namespace(number)
        settings = Path("/etc/netns") / namespace
        settings.mkdir(parents=True)
        names = zip(self.addresses, self.names, strict=True)
        (settings / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for a, name in names))
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "set", "lo", "up")
        self._connect(number)

    def _connect(self, number):
        veth = f"{self.bridge}v{number}"
        ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", self.namespace(number))
        ip("link", "set", veth, "master", self.bridge, "up")
        self._take_address(number)

    def _take_address(self, number):
        namespace = self.namespace(number)
        mac = f"02:00:00:00:00:{number:02x}"  # the same after `bad_link`: the other hosts keep it for up to a minute
        ip("-n", namespace, "link", "set", "eth0", "address", mac)
        ip("-n", namespace, "addr", "add", f"{self.addresses[number]}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")

    @contextlib.contextmanager
    def bad_link(self, number, delay, loss):
        """While it is entered, what a host sends takes so many seconds longer, and a share of its frames gets lost."""
        ip("link", "del", f"{self.bridge}v{number}")  # and its other end, eth0
        near, far = f"{self.bridge}n{number}", f"{self.bridge}f{number}"
        with tap(near) as bridge, tap(far) as host:
            ip("link", "set", near, "master", self.bridge, "up")
            ip("link", "set", far, "netns", self.namespace(number), "name", "eth0")
            self._take_address(number)
            relay = Relay(host, bridge, delay, loss)
            relay.start()
            try:
                yield relay
            finally:
                relay.ended = True
                relay.join()
        self._connect(number)

    def _make_ssh(self):
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        (self.folder / "config").write_text(
            f"User root\nIdentityFile {self.folder}/user\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
            "LogLevel ERROR\n"
        )
        wrapper = self.folder / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/config "$@"\n')
        wrapper.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)

    def restore(self, number, before="true", environment=""):
        """A host as it has to be, after whatever was done to it.

        before: a shell's commands, in its own mounts. environment: NAME=VALUE … that its sessions have.
        """
        self.set_link(number, "up")
        if number in self.servers:
            self.servers[number].kill()
            self.servers[number].wait()
        options = {
            "HostKey": self.folder / "host",
            "AuthorizedKeysFile": self.folder / "user.pub",
            "StrictModes": "no",
            "PermitRootLogin": "yes",
            "PidFile": "none",
            "UsePAM": "no",
            **({"SetEnv": f"'{environment}'"} if environment else {}),
        }
        sshd = f"{before} && exec {SSHD} -D -f /dev/null " + " ".join(f"-o {k}={v}" for k, v in options.items())
        command = [IP, "netns", "exec", self.namespace(number), "sh", "-c", sshd]
        self.servers[number] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + patience(10)
        while ":22 " not in self.run(number, "ss", "-ltnH"):
            assert time.monotonic() < deadline, "sshd does not start"
            time.sleep(0.05)

    def run(self, number, *command):
        """What a command on a host says."""
        words = [IP, "netns", "exec", self.namespace(number), *map(str, command)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def start(self, number, *arguments, **environment):
        """A Python of ours as a process on a host."""
        env = {
            **os.environ,
            "PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        words = [IP, "netns", "exec", self.namespace(number), sys.executable, *map(str, arguments)]
        return Started(words, cwd=ROOT, env=env)

    def hostfile(self, count):
        """A hostfile of the first so many hosts."""
        path = self.folder / f"hostfile-{count}"
        path.write_text("".join(f"{name} slots=1\n" for name in self.names[:count]))
        return path

    def set_link(self, number, state):
        """Cut a host off ("down"), or put it back."""
        ip("link", "set", f"{self.bridge}v{number}", state)

    def kill(self, number):
        """Kill all processes of a host, its sshd as well."""
        for pid in self._all(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, number):
        """{pid: command} of what runs on a host, but for its sshd, whose sessions may wait for who was cut off."""
        running = {}
        for pid in self._all(number):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if words and not words.startswith(("sshd:", SSHD)):  # a zombie has none
                    running[pid] = words
        return running

    def wait_until_idle(self, seconds, numbers=None):
        """No process of a run is left on any host, or on these, before so many seconds have passed."""
        numbers = range(self.count) if numbers is None else numbers
        deadline = time.monotonic() + patience(seconds)
        while left := {self.names[number]: found for number in numbers if (found := self.processes(number))}:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def _all(self, number):
        return [int(pid) for pid in ip("netns", "pids", self.namespace(number), check=False).split()]


@contextlib.contextmanager
def tap(name):
    """The file descriptor of a network device whose frames a process reads and writes; gone when it is left."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        no_packet_information, ethernet, set_interface = 0x1000, 0x0002, 0x400454CA  # linux/if_tun.h
        fcntl.ioctl(descriptor, set_interface, struct.pack("16sH", name.encode(), ethernet | no_packet_information))
        yield descriptor
    finally:
        os.close(descriptor)


class Relay(threading.Thread):
    """Carries frames between two devices: those of `slow` late and not all of them, as netem does."""

    def __init__(self, slow, fast, delay, loss):
        super().__init__(daemon=True)
        self.slow, self.fast, self.delay, self.loss = slow, fast, delay, loss
        self.ended, self.carried, self.lost = False, 0, 0

    def run(self):
        chance, late = random.Random(1), deque()  # (time to deliver it, frame)
        while not self.ended:
            wait = max(0.0, late[0][0] - time.monotonic()) if late else 0.1
            for device in select.select([self.slow, self.fast], [], [], min(wait, 0.1))[0]:
                for frame in self._frames(device):
                    if device == self.fast:
                        os.write(self.slow, frame)
                    elif chance.random() < self.loss:
                        self.lost += 1
                    else:
                        late.append((time.monotonic() + self.delay, frame))
            while late and late[0][0] <= time.monotonic():
                with contextlib.suppress(BlockingIOError):
                    os.write(self.fast, late.popleft()[1])
                self.carried += 1

    @staticmethod
    def _frames(device):
        with contextlib.suppress(BlockingIOError):
            for _ in range(100):
                yield os.read(device, 65536)


def remove_leftovers():
    """What a run of the tests that was killed has left behind."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        prefix, _, rest = name.partition("-")
        owner = rest.partition("-")[0]
        if prefix == PREFIX and not Path(f"/proc/{owner}").exists():
            for pid in ip("netns", "pids", name).split():
                os.kill(int(pid), signal.SIGKILL)
            _remove(name)
            _remove_links(f"{PREFIX}{owner}")


def _remove(namespace):
    ip("netns", "del", namespace, check=False)
    shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def _remove_links(bridge):
    # One by one: a connection that was cut keeps its namespace, and with it the link, for minutes.
    for line in ip("-br", "link").splitlines():
        name = line.split()[0].partition("@")[0]
        if name == bridge or name.startswith(f"{bridge}v"):
            ip("link", "del", name, check=False)
