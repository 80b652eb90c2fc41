"""Collectives on tensors and objects over all processes of a job."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lcm_ds.distributed.environment import DistEnv
from lcm_ds.distributed.rendezvous import wait_for_all_ranks

T = TypeVar("T")

TIMEOUT = timedelta(hours=12)  # one rank may decode sentences while the others wait


def from_first(value: T) -> T:
    """Broadcast rank 0's value to all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Ranks:
    """The process group of an evaluation; a single process needs none.

    Use it in a `with` block, in which all ranks call the same methods in the same order.
    """

    def __init__(self, env: DistEnv | None = None) -> None:
        self.env = env or DistEnv.local(0, 1, 0)
        self.rank, self.size = self.env.rank, self.env.world_size
        self.devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.device = torch.device("cuda", self.env.device_index(self.devices)) if self.devices else torch.device("cpu")

    def __enter__(self) -> Ranks:
        if self.size > 1:
            wait_for_all_ranks(self.env, "evaluate")
            self.env.enter(os.environ, self.devices)
            dist.init_process_group("gloo", timeout=TIMEOUT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the other ranks may never get here; the launcher ends them.
        if self.size > 1 and error is None:
            dist.destroy_process_group()

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                total = tensor.cpu()
                dist.all_reduce(total)
                tensor.copy_(total)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def from_first(self, value: T) -> T:
        """Broadcast rank 0's value to all ranks."""
        return value if self.size == 1 else from_first(value)
