"""A module of this package on many hosts at once, through pdsh and ssh.

What is sent to a host is the path of a file, never quoted arguments: the shells on the way would expand them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lcm_ds.processes import set_parent_death_signal

UNCHANGED_BY_SHELLS = re.compile(r"[\w@+=:,./-]+", re.ASCII)
CONNECT_SECONDS = 10
# Without a password, and a connection over which nothing comes back is given up after 15 seconds.
SSH_OPTIONS = ("BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", "ServerAliveInterval=5", "ServerAliveCountMax=3")

OnLine = Callable[[str, str, bool], None]  # of which host, the text, whether it came on stderr


def mistakes_of_call(folder: Path) -> list[str]:
    """What keeps pdsh from being used with this folder: one line each."""
    errors = []
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            errors.append(f"--hostfile: {program} is not installed here; it is in the package manager")
    paths = {"the current folder": str(Path.cwd()), "run_dir": str(folder.resolve()), "python": sys.executable}
    if "PYTHONPATH" in os.environ:
        paths["PYTHONPATH"] = os.environ["PYTHONPATH"]
    for what, value in paths.items():
        if not UNCHANGED_BY_SHELLS.fullmatch(value):
            errors.append(f"--hostfile: {what}: {value!r}: a remote shell changes such a path; use A-Z a-z 0-9 _ . / -")
    return errors


def pdsh_command(hosts: Sequence[str], module: str, path: Path | str) -> list[str]:
    """The call of pdsh that runs `python -m MODULE PATH NUMBER` on each host, which has this number in the list."""
    exported = f"PYTHONPATH={os.environ['PYTHONPATH']} " if os.environ.get("PYTHONPATH") else ""
    there = f"cd {Path.cwd()} && {exported}exec {sys.executable} -u -m {module} {path} %n"
    return ["pdsh", "-R", "ssh", "-S", "-f", str(len(hosts)), "-w", ",".join(hosts), there]


def pdsh_environment(environ: Mapping[str, str], ssh_port: int | None = None) -> dict[str, str]:
    """The variables that pdsh is called with: those given, and our options for ssh after the user's own."""
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    if ssh_port is not None:
        options += ["-p", str(ssh_port)]
    own = environ.get("PDSH_SSH_ARGS_APPEND", "")
    return {**environ, "PDSH_SSH_ARGS_APPEND": " ".join([own, *options]).strip()}


async def on_hosts(
    hosts: Sequence[str], module: str, path: Path | str, on_line: OnLine, ssh_port: int | None = None
) -> int:
    """Run a module on all hosts and hand on each line as it comes; returns pdsh's exit code.

    Cancelled, it leaves nothing running here; what runs on the hosts has to end by itself. Call it from the main
    thread.
    """
    process = await asyncio.create_subprocess_exec(
        *pdsh_command(hosts, module, path),
        env=pdsh_environment(os.environ, ssh_port),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
        start_new_session=True,  # a Ctrl-C on the terminal reaches the launcher alone
        preexec_fn=set_parent_death_signal(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        await asyncio.gather(_read(process.stdout, False, on_line), _read(process.stderr, True, on_line))
        return await process.wait()
    finally:
        _kill_with_children(process.pid)
        await process.wait()


def _kill_with_children(pid: int) -> None:
    """Kill pdsh and its ssh, each of which has a process group of its own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        pdsh = psutil.Process(pid)
        for process in [*pdsh.children(recursive=True), pdsh]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


async def _read(stream: asyncio.StreamReader, error: bool, on_line: OnLine) -> None:
    async for line in stream:
        host, colon, text = line.decode("utf-8", "replace").rstrip("\n").partition(": ")
        # pdsh's own words on the exit codes of ssh say less than what came before them
        if colon and not host.startswith("pdsh@"):
            on_line(host, text, error)
