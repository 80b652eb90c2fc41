"""The hosts of a run: a hostfile in DeepSpeed's format, a selection of its devices, and which host is this one."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcm_ds.errors import InputError

NAME = re.compile(r"(?:[\w.-]+@)?[\w.-]+")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Read lines `NAME slots=N`; returns the number of devices of each host, in the file's order.

    Empty lines and lines that start with # are skipped. Raises InputError with file and line of every mistake.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    line_of: dict[str, int] = {}
    errors: list[str] = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#", 1)[0].split() if line.strip() else []
        if not words:
            continue
        position = f"{path}: line {number}"
        slots = re.fullmatch(r"slots=(\d+)", words[1]) if len(words) == 2 else None
        if slots is None:
            errors.append(f"{position}: {line.strip()!r}: has to be NAME slots=N, as in 'worker-0 slots=8'")
        elif not NAME.fullmatch(words[0]):
            errors.append(f"{position}: {words[0]!r}: is not a host name")
        elif int(slots[1]) == 0:
            errors.append(
                f"{position}: {words[0]}: slots=0: has to be 1 or more; remove the line to leave the host out"
            )
        elif words[0] in line_of:
            errors.append(f"{position}: {words[0]}: is already in line {line_of[words[0]]}")
        else:
            hosts[words[0]] = int(slots[1])
        line_of.setdefault(words[0], number)
    if not hosts and not errors:
        errors.append(f"{path}: has no hosts; a line is NAME slots=N, as in 'worker-0 slots=8'")
    if errors:
        raise InputError(errors)
    return hosts


def select(hosts: dict[str, int], include: str = "", exclude: str = "") -> dict[str, list[int]]:
    """Apply DeepSpeed's --include or --exclude, such as 'worker-0@worker-1:0,2'.

    Args:
        hosts: The number of devices of each host.
        include: Hosts, or devices of them, to use.
        exclude: Hosts, or devices of them, to leave unused.

    Returns:
        The devices of each host.

    Raises:
        InputError: both are given, they name what the hostfile does not have, or nothing is left.
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
        raise InputError(f"{option}: {error}; the form is HOST[:SLOT,SLOT…][@HOST…], of the hostfile") from None
    if not chosen:
        raise InputError(f"{option}: leaves no device of the hostfile")
    return chosen


def visible_devices(host: str, slots: Sequence[int], environ: Mapping[str, str]) -> str:
    """CUDA_VISIBLE_DEVICES of a host's workers: its slots count the devices that are visible there already.

    A scheduler that shares a host among jobs gives each its devices by this variable.

    Args:
        host: Its name, for the message.
        slots: The chosen slots of the hostfile, counted from 0.
        environ: The variables of a process of that host.

    Returns:
        The devices, separated by commas; nothing if none was visible.

    Raises:
        InputError: a slot is not among the visible devices.
    """
    given = environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return ",".join(map(str, slots))
    visible = [device.strip() for device in given.split(",") if device.strip()]
    if visible and max(slots) >= len(visible):
        raise InputError(
            f"{host}: slot {max(slots)} of the hostfile is not among the {len(visible)} devices of "
            f"CUDA_VISIBLE_DEVICES={given}: give slots={len(visible)}, or unset the variable if all devices are yours"
        )
    return ",".join(visible[slot] for slot in slots) if visible else ""


def is_this_host(name: str) -> bool:
    """Whether a host's name refers to this machine."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(name.rpartition("@")[2], None)}
    except OSError:
        return False
    return any(map(_can_bind, addresses))


def _can_bind(address: str) -> bool:
    """Whether an address belongs to an interface of this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
