"""A copy of a rank's state in host memory that is allocated once and reused by every save.

On GPUs the memory is page-locked, so that the copy runs at the speed of the bus: into fresh pageable memory it takes a
page fault every 4 KiB, and the driver copies every byte twice.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

logger = logging.getLogger("lcm_ds.train")

BLOCK = 64 * 2**20  # bytes of a block for several tensors; a larger tensor has one of its own size
ALIGNMENT = 64  # bytes


class HostBuffer:
    """Host memory in blocks, which grows to what a save needs and stays.

    page_lock, page_unlock: for a block, uint8 [bytes]; page_lock returns whether the block is locked now. Default: by
    CUDA's driver on GPUs, else nothing.
    """

    def __init__(
        self, page_lock: Callable[[Tensor], bool] | None = None, page_unlock: Callable[[Tensor], None] | None = None
    ) -> None:
        on_cuda = get_accelerator().device_name() == "cuda"
        self._page_lock = page_lock or (_page_lock if on_cuda else lambda block: False)
        self._page_unlock = page_unlock or _page_unlock
        self._blocks: list[Tensor] = []
        self._locked: list[Tensor] = []
        self._used: list[int] = []  # bytes of each block
        self._copied = 0

    @property
    def bytes(self) -> int:
        """Size of all blocks."""
        return sum(len(block) for block in self._blocks)

    @property
    def copied(self) -> int:
        """Bytes of all tensors copied since `rewind`."""
        return self._copied

    def rewind(self) -> None:
        """Use the memory again: the copies made so far must no longer be in use."""
        self._used, self._copied = [0] * len(self._blocks), 0

    def release(self) -> None:
        """Free the memory."""
        for block in self._locked:
            self._page_unlock(block)
        self._blocks, self._locked, self._used = [], [], []

    def copy_of(self, value: Any) -> Any:
        """A copy of a state with all its tensors in this memory, each with a storage of its own size."""
        copied = self._copy(value, {})
        get_accelerator().synchronize()  # the copies run beside this thread
        return copied

    def _copy(self, value: Any, known: dict[int, Any]) -> Any:
        """known: copies by the id of the original, for objects that occur twice."""
        if id(value) in known:
            return known[id(value)]
        copied: Any
        if isinstance(value, Tensor):
            copied = self._take(value.shape, value.dtype).copy_(value.detach(), non_blocking=True)
        elif type(value) in (list, tuple):
            copied = type(value)(self._copy(item, known) for item in value)
        elif isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
            copied = copy.copy(value)
            copied.update((key, self._copy(item, known)) for key, item in value.items())
        else:
            copied = copy.deepcopy(value)
        known[id(value)] = copied
        return copied

    def _take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel() * dtype.itemsize
        self._copied += size
        if not size:
            return torch.empty(shape, dtype=dtype)
        for index, block in enumerate(self._blocks):
            if len(block) - self._used[index] >= size:
                break
        else:
            index, block = len(self._blocks), torch.empty(max(size, BLOCK), dtype=torch.uint8, device="cpu")
            if self._page_lock(block):
                self._locked.append(block)
            self._blocks.append(block)
            self._used.append(0)
        first = self._used[index]
        self._used[index] = first + -(-size // ALIGNMENT) * ALIGNMENT
        # By numpy, so that the storage, which torch.save writes, is this part of the block only.
        return torch.from_numpy(block.numpy()[first : first + size]).view(dtype).view(shape)


def _page_lock(block: Tensor) -> bool:
    # Not torch's pin_memory: it rounds sizes up to a power of two.
    error = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), len(block), 0))
    if error:
        logger.warning("%d bytes for checkpoints could not be page-locked: CUDA error %d", len(block), error)
        with contextlib.suppress(RuntimeError):  # takes the error back, which the next kernel would raise
            torch.zeros(1, device="cuda")
    return not error


def _page_unlock(block: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
