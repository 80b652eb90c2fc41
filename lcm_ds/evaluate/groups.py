"""What documents share (source.group_column): the bootstrap resamples groups, as documents of one group are alike."""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_ds.data.format import Dataset
from lcm_ds.data.shard import open_shard


class Groups:
    """The groups of a dataset's documents; without source.group_column each document is a group of its own.

    Raises InputError if a document's JSON cannot be read.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._of_document: Tensor | None = None
        self.count = dataset.info.totals.documents
        if not dataset.has_groups:
            return
        numbers: dict[tuple[bool, str], int] = {}
        found = []
        for shard in (open_shard(dataset, index) for index in range(len(dataset.shards))):
            for document, group in enumerate(shard.groups):
                # A document without a group is one of its own.
                key = (False, f"{shard.name}#{document}") if group is None else (True, group)
                found.append(numbers.setdefault(key, len(numbers)))
        self._of_document, self.count = torch.tensor(found), len(numbers)

    @property
    def named(self) -> bool:
        """Whether documents share groups."""
        return self._of_document is not None

    def of(self, documents: Tensor) -> Tensor:
        """The groups of documents, int64 [n]: both counted through the dataset in the order of its shards."""
        return documents if self._of_document is None else self._of_document.to(documents.device)[documents]
