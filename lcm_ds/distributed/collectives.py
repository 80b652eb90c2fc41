"""What the processes of a job compute together."""

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
from lcm_ds.distributed.rendezvous import meet

T = TypeVar("T")

PATIENCE = timedelta(hours=12)  # one may be decoding sentences that the others wait for


def from_first(value: T) -> T:
    """What rank 0 has, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Ranks:
    """All of them together; one alone needs no others. Inside a `with`, all call the same methods in the same order."""

    def __init__(self, place: DistEnv | None = None) -> None:
        self.place = place or DistEnv(0, 1, 0, 1, "127.0.0.1", 0)
        self.rank, self.size = self.place.rank, self.place.world_size
        if torch.cuda.is_available():
            # Under srun --gpus-per-task=1 each process sees one device, whatever its local rank.
            self.device = torch.device("cuda", self.place.local_rank % torch.cuda.device_count())
        else:
            self.device = torch.device("cpu")

    def __enter__(self) -> Ranks:
        if self.size > 1:
            meet(self.place, "evaluate")
            os.environ.update(self.place.environment())
            dist.init_process_group("gloo", timeout=PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the others may not come: who started them ends them.
        if self.size > 1 and error is None:
            dist.destroy_process_group()

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Make each tensor, in place, the sum of those of all ranks."""
        if self.size > 1:
            for tensor in tensors:
                total = tensor.cpu()
                dist.all_reduce(total)
                tensor.copy_(total)

    def gather(self, mine: Any) -> list[Any]:
        """What each rank gives, in order of the ranks, to all of them."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def from_first(self, mine: T) -> T:
        """What rank 0 gives, to all of them."""
        if self.size == 1:
            return mine
        return from_first(mine)
