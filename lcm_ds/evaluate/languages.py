"""The language of each document of a dataset, for results by language."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcm_ds.data.format import Dataset
from lcm_ds.data.shard import open_shard


class Languages(NamedTuple):
    """Languages of documents."""

    names: list[str]  # codes of SONAR, sorted; none if the dataset has not several
    of_document: Tensor  # int64 [documents]: index in `names`, -1 for documents without a language


def languages_of(dataset: Dataset) -> Languages:
    """The languages in the documents' JSON, read if dataset.json lists several. Raises InputError."""
    named = dataset.info.source.get("documents_by_language")
    names = sorted(named) if isinstance(named, dict) else []
    if len(names) < 2:
        return Languages([], torch.empty(0, dtype=torch.long))
    index_of = {name: index for index, name in enumerate(names)}
    found = [
        index_of.get(str(shard.meta(document).get("language")), -1)
        for shard in (open_shard(dataset, index) for index in range(len(dataset.shards)))
        for document in range(len(shard))
    ]
    present = sorted(set(found) - {-1})
    renumbered = torch.full((len(names) + 1,), -1)  # the last for -1
    renumbered[present] = torch.arange(len(present))
    return Languages([names[index] for index in present], renumbered[torch.tensor(found)])
