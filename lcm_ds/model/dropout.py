"""Dropout that is a function of a row's key, and not of what was drawn before.

With torch's dropout a row would lose other values with another number of devices, another micro-batch, or after a
resume. Here whether a value is dropped is a hash of (key of its row, layer, position, dimension).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


class Draw(NamedTuple):
    """Decides which values of a batch are dropped."""

    keys: Tensor  # int64 [rows, 1, 1], below 2**32
    numbers: Tensor  # int64 [1, row_length, hidden_size], below 2**32: of position and dimension, hashed
    p: float  # share that is dropped

    @classmethod
    def of(cls, keys: Tensor, row_length: int, hidden_size: int, p: float) -> Draw:
        """keys: int64 [rows]."""
        numbers = torch.arange(row_length * hidden_size, device=keys.device).view(1, row_length, hidden_size)
        return cls(mix((keys & WORD).view(-1, 1, 1)), mix(numbers), p)

    def at(self, site: int) -> Draw:
        """The draw for one site in the model, so that each site drops other values."""
        return self._replace(keys=mix(self.keys + site))


def drop(x: Tensor, draw: Draw | None) -> Tensor:
    """x [rows, row_length, hidden_size] with a share p of it set to 0 and the rest times 1 / (1 − p).

    draw: that of this site in the model, see `Draw.at`; None leaves x unchanged.
    """
    if draw is None:
        return x
    kept = mix(draw.numbers ^ draw.keys) >= int(draw.p * 2**32)
    return torch.where(kept, x / (1 - draw.p), 0.0)


def mix(numbers: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby, public domain): each int64 below 2**32 to another, every bit mixed."""
    # Products run over 63 bits; what wraps is above the 32 that are kept.
    numbers = numbers & WORD
    numbers = ((numbers ^ (numbers >> 16)) * 0x85EBCA6B) & WORD
    numbers = ((numbers ^ (numbers >> 13)) * 0xC2B2AE35) & WORD
    return numbers ^ (numbers >> 16)
