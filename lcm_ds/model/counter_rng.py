"""Dropout and Gaussian noise that are functions of a row's key, not of what was drawn before.

With torch's generators a row would get other values with another number of devices, another micro-batch, after a resume
or on another kind of device. Here value i of a row is a hash of (the row's key, i), as counter-based generators do it
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): any part of it on any device, in one pass.

Words of 32 bits are kept as int32, whose products wrap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lcm_ds.model.fused import fused

ALIGNMENT = 4  # int32 words in 16 bytes: compiled code copies inputs that begin in between


class Draw(NamedTuple):
    """Decides which values of a batch are dropped at one site of the model."""

    keys: Tensor  # int32 [rows, 1, 1]
    indices: Tensor  # int32 [1, row_length, hidden_size]: hashes of (position, dimension)
    p: float  # share that is dropped


class DropoutDraws(NamedTuple):
    """The draws of all sites of a model, each of which drops other values."""

    keys: Tensor  # int32 [sites, rows, 1, 1]
    indices: Tensor
    p: float

    @classmethod
    def of(cls, keys: Tensor, sites: int, row_length: int, hidden_size: int, p: float) -> DropoutDraws:
        """The draws for a batch.

        Args:
            keys: int64 [rows], of which the lower 32 bits count.
            sites: Number of dropout layers.
            row_length: Concepts of a row.
            hidden_size: Values of a concept.
            p: Share that is dropped.
        """
        return cls(*_dropout_hashes(keys, sites, row_length, hidden_size), p)

    def at(self, site: int) -> Draw:
        """The draw of one site."""
        return Draw(self.keys[site], self.indices, self.p)


@fused
def _dropout_hashes(keys: Tensor, sites: int, row_length: int, hidden_size: int) -> tuple[Tensor, Tensor]:
    rows = len(keys)
    padded = torch.nn.functional.pad(keys.to(torch.int32), (0, -rows % ALIGNMENT))
    site = torch.arange(sites, dtype=torch.int32, device=keys.device)
    of_sites = mix(mix(padded) + site[:, None])[:, :rows, None, None]
    indices = torch.arange(row_length * hidden_size, dtype=torch.int32, device=keys.device)
    return of_sites, mix(indices).view(1, row_length, hidden_size)


@fused
def add_dropped(residual: Tensor, x: Tensor, draw: Draw | None) -> Tensor:
    """residual + `drop(x, draw)`, both [rows, row_length, hidden_size]."""
    return residual + drop(x, draw)


def drop(x: Tensor, draw: Draw | None) -> Tensor:
    """x [rows, row_length, hidden_size] with a share p of it set to 0 and the rest times 1 / (1 − p).

    draw: of this site in the model; None leaves x unchanged.
    """
    if draw is None:
        return x
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # Row by row, so that the hashes of one stay in the processor's cache.
        dropped = torch.empty(x.shape, dtype=torch.bool)
        for of_row, key in zip(dropped, draw.keys, strict=True):
            of_row.copy_(_dropped(draw.indices[0], key, draw.p))
    else:
        dropped = _dropped(draw.indices, draw.keys, draw.p)
    return (x / (1 - draw.p)).masked_fill(dropped, 0.0)


def _dropped(indices: Tensor, keys: Tensor, p: float) -> Tensor:
    # Compared as unsigned words: with the highest bit flipped their order is that of int32.
    return mix(indices ^ keys) ^ -(2**31) < int(p * 2**32) - 2**31


@fused
def normal(keys: Tensor, row_length: int, dims: int) -> Tensor:
    """Standard normal values, fp32, by Box and Muller (1958): the same on all devices to rounding.

    Args:
        keys: int64 [rows], of which all 64 bits count.
        row_length: Concepts of a row.
        dims: Values of a concept.

    Returns:
        [rows, row_length, dims]; a value depends on (key, position · dims + dimension) only.
    """
    indices = mix(torch.arange(row_length * dims, dtype=torch.int32, device=keys.device))
    # Two words that both depend on the complete key (a Feistel network of two rounds), so that no two rows share one.
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    high = high ^ mix(low)
    low = low ^ mix(high)
    # Integers below 2**31; the half keeps the logarithm finite. The sine, a second value, would cost a second kernel.
    first, second = (((mix(indices ^ mix(word).unsqueeze(1)) >> 1) & 0x7FFFFFFF).float() for word in (low, high))
    radius = (((first + 0.5) * 2.0**-31).log() * -2).sqrt()
    return (radius * (second * (math.tau * 2.0**-31)).cos()).unflatten(1, (row_length, dims))


def mix(words: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby, public domain): each int32 to another, every bit mixed."""
    # `>>` repeats the sign; the masks make its shifts those of unsigned words.
    words = (words ^ ((words >> 16) & 0xFFFF)) * (0x85EBCA6B - 2**32)
    words = (words ^ ((words >> 13) & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
    return words ^ ((words >> 16) & 0xFFFF)
