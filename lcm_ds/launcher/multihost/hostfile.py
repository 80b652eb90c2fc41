"""The hosts of a run: a hostfile in DeepSpeed's format, what is taken of it, and which of them is this one."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from lcm_ds.errors import InputError

NAME = re.compile(r"(?:[\w.-]+@)?[\w.-]+")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """The hosts in a file of lines `NAME slots=N`, in its order, with the number of devices each has.

    Empty lines and lines that start with # are left out. Raises InputError naming file and line of every mistake.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    seen: dict[str, int] = {}
    errors: list[str] = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#", 1)[0].split() if line.strip() else []
        if not words:
            continue
        where = f"{path}: line {number}"
        slots = re.fullmatch(r"slots=(\d+)", words[1]) if len(words) == 2 else None
        if slots is None:
            errors.append(f"{where}: {line.strip()!r}: has to be NAME slots=N, as in 'worker-0 slots=8'")
        elif not NAME.fullmatch(words[0]):
            errors.append(f"{where}: {words[0]!r}: is no name of a host")
        elif int(slots[1]) == 0:
            errors.append(f"{where}: {words[0]}: slots=0: has to be 1 or more; take the line out to leave the host out")
        elif words[0] in seen:
            errors.append(f"{where}: {words[0]}: stands in line {seen[words[0]]}, too")
        else:
            hosts[words[0]] = int(slots[1])
        seen.setdefault(words[0], number)
    if not hosts and not errors:
        errors.append(f"{path}: names no host; a line is NAME slots=N, as in 'worker-0 slots=8'")
    if errors:
        raise InputError(errors)
    return hosts


def select(hosts: dict[str, int], include: str = "", exclude: str = "") -> dict[str, list[int]]:
    """The devices of each host that are left by DeepSpeed's --include or --exclude ('worker-0@worker-1:0,2').

    Raises InputError where both are given, they name what is not there, or nothing is left.
    """
    if include and exclude:
        raise InputError(f"--include {include!r} and --exclude {exclude!r}: only one of them can be given")
    if not include and not exclude:
        return {host: list(range(slots)) for host, slots in hosts.items()}
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    option = f"--include {include!r}" if include else f"--exclude {exclude!r}"
    try:
        chosen = dict(parse_inclusion_exclusion(hosts, include, exclude))
    except ValueError as error:
        raise InputError(f"{option}: {error}; it is HOST[:SLOT,SLOT…][@HOST…] of the hostfile") from None
    if not chosen:
        raise InputError(f"{option}: leaves no device of the hostfile")
    return chosen


def is_this_host(name: str) -> bool:
    """Whether a host's name means the machine that this runs on."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(name.rpartition("@")[2], None)}
    except OSError:
        return False
    return any(_is_own(address) for address in addresses)


def _is_own(address: str) -> bool:
    """Whether an address belongs to an interface of this machine: only to those can a socket be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
