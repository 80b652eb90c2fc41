"""What the launcher sends to the hosts for one start of a task: a file in RUN/launch/ that only its owner can read."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from lcm_ds.distributed.environment import DistEnv


@dataclass(frozen=True)
class Host:
    """The ranks of one host."""

    name: str  # as in the hostfile
    devices: list[int]  # counted among those that are visible to a process of the host
    first_rank: int
    interface: str | None  # network interface to the other hosts, if known
    visible: str | None = None  # CUDA_VISIBLE_DEVICES that the launcher's own host has from its scheduler


@dataclass(frozen=True)
class LaunchSpec:
    """One start of a `LaunchTask` on many hosts, as it is written to the file."""

    token: str  # of this start, for the connection to the launcher
    launcher_addresses: list[str]
    launcher_port: int
    heartbeat_timeout: float  # seconds
    grace: float  # seconds between SIGTERM and SIGKILL
    module: str  # of a worker: python -m MODULE CONFIG
    config: str
    environment: dict[str, str]
    master_addr: str
    master_port: int
    hosts: list[Host]

    @property
    def world_size(self) -> int:
        """The number of ranks on all hosts."""
        return sum(len(host.devices) for host in self.hosts)

    def dist_env(self, host: Host, local_rank: int) -> DistEnv:
        """The rank of one worker."""
        rank, local_size = host.first_rank + local_rank, len(host.devices)
        return DistEnv(rank, self.world_size, local_rank, local_size, self.master_addr, self.master_port)

    def log(self, rank: int) -> Path:
        """The file for a rank's output."""
        return Path(self.config).parent / f"rank-{rank:05d}.log"

    def write(self, path: Path) -> None:
        """Write the file."""
        write_private(path, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> LaunchSpec:
        """Read the file. Raises OSError, ValueError or TypeError."""
        mapping = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**mapping, "hosts": [Host(**host) for host in mapping["hosts"]]})


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
