"""Which training documents are held out, to choose penalties and the best baseline by.

One in HELD_OUT. With source.group_column it is one in HELD_OUT groups, because documents of one group are alike: none
is on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from itertools import accumulate

import torch
from torch import Tensor

from lcm_ds.data.format import Dataset
from lcm_ds.data.shard import open_shard

HELD_OUT = 10

Choice = Callable[[Tensor], Tensor]  # int64 [n], documents counted through their dataset → bool [n]


def held_out_of(dataset: Dataset) -> Choice:
    """What tells which documents of a training dataset are held out; the same on all ranks."""
    return _ByGroup(dataset) if dataset.has_groups else is_held_out


def is_held_out(document: Tensor) -> Tensor:
    """Which documents are held out if each is a group of its own: bool [n] of int64 [n].

    By a multiplicative hash, so that the choice is not periodic.
    """
    return ((document * 0x9E3779B1) >> 16) % HELD_OUT == 0


def group_is_held_out(group: str) -> bool:
    """Whether a group is held out, by a hash of its name: the same in all datasets."""
    # Independent of the hash that splits training from validation data.
    digest = blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


class _ByGroup:
    """Reads the groups of a shard when one of its documents is asked for. Raises InputError if they cannot be read."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._firsts = torch.tensor([*accumulate((shard.documents for shard in dataset.shards), initial=0)])
        self._shards: dict[int, Tensor] = {}  # bool [documents] of each shard that was asked for

    def __call__(self, document: Tensor) -> Tensor:
        known = document.cpu().contiguous()
        shards = torch.searchsorted(self._firsts, known, right=True) - 1
        chosen = torch.empty_like(known, dtype=torch.bool)
        for shard in shards.unique().tolist():
            own = shards == shard
            chosen[own] = self._shard(shard)[known[own] - self._firsts[shard]]
        return chosen.to(document.device)

    def _shard(self, index: int) -> Tensor:
        if index not in self._shards:
            groups = open_shard(self._dataset, index).groups
            single = is_held_out(torch.arange(len(groups)) + self._firsts[index]).tolist()
            self._shards[index] = torch.tensor(
                [own if group is None else group_is_held_out(group) for group, own in zip(groups, single, strict=True)]
            )
        return self._shards[index]
