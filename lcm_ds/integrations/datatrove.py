"""Steps for datatrove's executors (local, Slurm, Ray): the last two stages of a pipeline, from text to a dataset.

    from datatrove.executor import LocalPipelineExecutor
    from lcm_ds.integrations.datatrove import EncodeConcepts, FinishDataset

    config = "configs/prepare/fineweb.yaml"
    encode = LocalPipelineExecutor([EncodeConcepts(config)], tasks=8, logging_dir="logs/encode")
    LocalPipelineExecutor([FinishDataset(config)], depends=encode, logging_dir="logs/finish").run()

EncodeConcepts takes no documents from a step before it. It makes units of the config's own source, so that the dataset
is, byte for byte, that of `lcm-ds prepare`, for any number of tasks: documents that come through a pipeline are
divided by the number of its tasks, and their numbers in the dataset are only known when all tasks have ended. Texts
that a pipeline has filtered go through files, as between all of datatrove's stages: it ends with a JsonlWriter, whose
folder is the source of the config. The stages may then run on different machines, the last one on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from datatrove.pipeline.base import PipelineStep

from lcm_ds.config import PrepareConfig, dump, load
from lcm_ds.errors import InputError


class _Stage(PipelineStep):
    """A step that has a pipeline for itself.

    Args:
        config: The path of a YAML file, or a config. Paths in it start at the folder in which the executor is started.
        overrides: key=value.

    Raises InputError if the config is invalid.
    """

    type = "🧠 - LCM-DS"

    def __init__(self, config: str | PrepareConfig, *overrides: str) -> None:
        super().__init__()
        loaded = config if isinstance(config, PrepareConfig) else load(PrepareConfig, config, overrides)
        self.config = dump(loaded)  # as text, which executors write into their logs and send to other hosts

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do the work of a task; there are no documents for a next step.

        Args:
            data: None: this is the first step of its pipeline.
            rank: The task, from 0.
            world_size: The number of tasks.

        Raises:
            InputError: As `lcm_ds.api.prepare`, and if there is a step before this one.
        """
        if data is not None:
            raise InputError(
                f"{type(self).__name__} has to be the first step of a pipeline: it reads the source of its config; "
                "write the documents of other steps with JsonlWriter in a pipeline before it, and name the files there"
            )
        with self.track_time("task"):
            self.work(PrepareConfig(**yaml.safe_load(self.config)), rank, world_size)
        return iter(())

    def work(self, config: PrepareConfig, rank: int, world_size: int) -> None:
        """The work of a task.

        Args:
            config: Of the preparation.
            rank: The task.
            world_size: The number of tasks.
        """
        raise NotImplementedError


class EncodeConcepts(_Stage):
    """Makes a share of the units of a dataset; those that are made already are kept, so that a task can run again."""

    name = "encode"

    def work(self, config: PrepareConfig, rank: int, world_size: int) -> None:
        """Make the units of a task."""
        from lcm_ds.prepare.shares import make_share  # imports torch, which takes seconds

        def count(unit: Any) -> None:
            self.stat_update("units")
            self.stat_update("documents", value=unit.documents, unit="unit")
            self.stat_update("sentences", value=unit.sentences, unit="unit")
            for reason, refused in unit.refused.items():
                self.stat_update(f"refused_{reason}", value=refused, unit="unit")

        make_share(config, rank, world_size, count)


class FinishDataset(_Stage):
    """Makes the dataset of the units, in one task, once all tasks of EncodeConcepts have ended."""

    name = "finish"

    def work(self, config: PrepareConfig, rank: int, world_size: int) -> None:
        """Finish the dataset."""
        from lcm_ds.prepare.shares import finish_shares

        if world_size > 1:
            raise InputError(f"FinishDataset: tasks={world_size}: has to be 1, as there is one dataset to finish")
        finish_shares(config)
