"""What the launcher tells the hosts of one start of a run: a file in RUN/launch/ that its owner alone can read."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from lcm_ds.distributed.environment import DistEnv


@dataclass(frozen=True)
class Host:
    """One host's share."""

    name: str  # as in the hostfile
    devices: list[int]
    first_rank: int
    interface: str | None  # that leads to the others, where that is known


@dataclass(frozen=True)
class LaunchSpec:
    """One start of workers on many hosts."""

    token: str  # of this start, for the connection to the launcher
    launcher: list[str]  # the launcher's addresses
    port: int
    silence: float  # seconds without a sign of life after which the other end is taken for dead
    grace: float  # seconds between SIGTERM and SIGKILL
    module: str  # of a worker: python -m MODULE CONFIG
    config: str
    environment: dict[str, str]
    master_addr: str
    master_port: int
    hosts: list[Host]

    @property
    def world_size(self) -> int:
        """All ranks together."""
        return sum(len(host.devices) for host in self.hosts)

    def place(self, host: Host, local_rank: int) -> DistEnv:
        """Where one worker stands."""
        rank, local_size = host.first_rank + local_rank, len(host.devices)
        return DistEnv(rank, self.world_size, local_rank, local_size, self.master_addr, self.master_port)

    def log(self, rank: int) -> Path:
        """Where what a rank says is kept."""
        return Path(self.config).parent / f"rank-{rank:05d}.log"

    def write(self, path: Path) -> None:
        """Write it for the hosts to read."""
        write_private(path, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> LaunchSpec:
        """What was written. Raises OSError, ValueError or TypeError."""
        mapping = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**mapping, "hosts": [Host(**host) for host in mapping["hosts"]]})


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone can read, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
