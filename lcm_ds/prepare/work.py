"""What the units of a preparation are made of, and how: one rank's part of it, for texts and for adopted concepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lcm_ds.data.format import EndOfText, Supervised
from lcm_ds.data.quantization import Quantization
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.state import UnitResult


class Work(Protocol):
    """A source and what makes concepts of it."""

    @property
    def embed_dim(self) -> int:
        """Numbers in a concept."""

    @property
    def end_of_text(self) -> EndOfText | None:
        """What ends each document."""

    @property
    def supervised(self) -> Supervised | None:
        """Set if documents have a source and a target."""

    @property
    def threads(self) -> int | None:
        """Of a process that encodes; None if nothing is encoded."""

    @property
    def processes(self) -> int:
        """That make units, over all ranks."""

    @property
    def total(self) -> int | None:
        """Documents of the source; None if only known after reading all."""

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file of the source."""

    def estimate(self) -> int | None:
        """Approximate bytes of the dataset; None if unknown."""

    def encoder(self) -> dict[str, Any]:
        """What makes or made the concepts, for dataset.json."""

    def splitter(self, units: Sequence[UnitResult] | None = None) -> dict[str, Any]:
        """What splits or split texts into sentences, for dataset.json; units: all of them, once they are made."""

    def language(self) -> str | None:
        """The language of the sentences, for dataset.json."""

    def describe(self) -> dict[str, Any]:
        """Where the documents are from, for dataset.json."""

    def index(self) -> dict[str, Any]:
        """The result of inspecting the source, for other ranks and for resuming."""

    def sizes_in(self, index: dict[str, Any]) -> dict[str, int]:
        """`sizes` of the source that an `index` is of."""

    def quantization(self) -> Quantization:
        """The steps of int8, from the first concepts. Raises InputError if there are too few."""

    def make_units(self, coordinator: Coordinator, quantization: Quantization | None, done: set[int]) -> None:
        """Make units until none is left to claim, and report each.

        Args:
            coordinator: To the other ranks.
            quantization: For int8.
            done: The units that are done.

        Raises:
            InputError: The source cannot be read, the disk is full, or what is encoded does not fit into memory.
        """

    def summary(self, units: list[Any], scale: np.ndarray) -> str | None:
        """A last line about the units, given the normaliser's scale; None if there is nothing to say."""

    def close(self) -> None:
        """End its processes."""
