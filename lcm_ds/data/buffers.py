"""Memory for batches, reused as soon as a batch is freed: fresh memory costs a page fault every 4 KiB."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from contextlib import suppress
from math import prod

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Tensors of one shape and dtype, on the CPU. Safe to use from several threads.

    pinned: in page-locked memory, from which a GPU copies asynchronously; PyTorch caches that itself.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> None:
        self.shape, self.dtype, self.pinned = shape, dtype, pinned
        self._free: deque[mmap.mmap] = deque()

    def take(self) -> Tensor:
        """An uninitialised tensor. Its memory is reused when it and all views of it are gone."""
        if self.pinned:
            return torch.empty(self.shape, dtype=self.dtype, pin_memory=True)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = mmap.mmap(-1, max(1, prod(self.shape) * self.dtype.itemsize))
            with suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        # Only the tensor's storage, which its views share, holds this array.
        array = np.frombuffer(memory, np.uint8, prod(self.shape) * self.dtype.itemsize)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return torch.from_numpy(array).view(self.dtype).view(self.shape)
