"""Running a module of this package on many hosts at once, through pdsh and ssh.

Hosts get the path of a file, never quoted arguments: the shells on the way would expand them.
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

SHELL_SAFE = re.compile(r"[\w@+=:,./-]+", re.ASCII)
CONNECT_SECONDS = 10
# No password prompts; ssh gives up a connection after 15 seconds without an answer.
SSH_OPTIONS = ("BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", "ServerAliveInterval=5", "ServerAliveCountMax=3")

OnLine = Callable[[str, str, bool], None]  # the host, the text, whether it came on stderr


def errors_of_call(folder: Path) -> list[str]:
    """What keeps pdsh from being used with this run folder, one line each."""
    errors = []
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            errors.append(f"--hostfile: {program} is not installed here: install it with your package manager")
    paths = {"the current folder": str(Path.cwd()), "run_dir": str(folder.resolve()), "python": sys.executable}
    if "PYTHONPATH" in os.environ:
        paths["PYTHONPATH"] = os.environ["PYTHONPATH"]
    for name, path in paths.items():
        if not SHELL_SAFE.fullmatch(path):
            errors.append(
                f"--hostfile: {name}: {path!r}: a remote shell would change this path; use A-Z a-z 0-9 _ . / -"
            )
    return errors


def short_names(host: str) -> tuple[str, str]:
    """The names that pdsh may print for a host: without user, and without a domain that all hosts have in common."""
    name = host.rpartition("@")[2]
    return name, name.partition(".")[0]


def pdsh_command(hosts: Sequence[str], module: str, path: Path | str) -> list[str]:
    """The call of pdsh that runs `python -m MODULE PATH INDEX` on each host, with its index in the list."""
    exports = f"PYTHONPATH={os.environ['PYTHONPATH']} " if os.environ.get("PYTHONPATH") else ""
    remote = f"cd {Path.cwd()} && {exports}exec {sys.executable} -u -m {module} {path} %n"
    return ["pdsh", "-R", "ssh", "-S", "-f", str(len(hosts)), "-w", ",".join(hosts), remote]


def pdsh_environment(environ: Mapping[str, str], ssh_port: int | None = None) -> dict[str, str]:
    """The variables for pdsh, with our options for ssh after the user's."""
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    if ssh_port is not None:
        options += ["-p", str(ssh_port)]
    user_options = environ.get("PDSH_SSH_ARGS_APPEND", "")
    return {**environ, "PDSH_SSH_ARGS_APPEND": " ".join([user_options, *options]).strip()}


async def run_on_all(
    hosts: Sequence[str], module: str, path: Path | str, on_line: OnLine, ssh_port: int | None = None
) -> int:
    """Run a module on all hosts. Call it from the main thread.

    If it is cancelled, nothing of it keeps running on this machine; the processes on the hosts have to notice.

    Args:
        hosts: As in the hostfile.
        module: Of this package.
        path: Its first argument; the second is the host's index.
        on_line: Gets each line of output as it comes.
        ssh_port: Of all hosts; default: ssh's own configuration.

    Returns:
        pdsh's exit code.
    """
    process = await asyncio.create_subprocess_exec(
        *pdsh_command(hosts, module, path),
        env=pdsh_environment(os.environ, ssh_port),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
        start_new_session=True,  # Ctrl-C on the terminal reaches only the launcher
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
    """Kill pdsh and its ssh processes, each of which has its own process group."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        pdsh = psutil.Process(pid)
        for process in [*pdsh.children(recursive=True), pdsh]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


async def _read(stream: asyncio.StreamReader, error: bool, on_line: OnLine) -> None:
    async for line in stream:
        host, colon, text = line.decode("utf-8", "replace").rstrip("\n").partition(": ")
        # pdsh's own messages on ssh's exit codes add nothing to the lines before them.
        if colon and not host.startswith("pdsh@"):
            on_line(host, text, error)
