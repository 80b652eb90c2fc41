"""Ray's actors with the HashEncoder, in a module that other processes import."""

import os
from functools import cached_property
from pathlib import Path

import ray
from preparing import use_the_hash_encoder

from lcm_ds.integrations.ray import Maker


class HashMaker(Maker):
    """An actor with the HashEncoder."""

    @cached_property
    def _work(self):
        use_the_hash_encoder()
        return super()._work

    def make_units(self, *arguments):
        """Tell the test on which node and GPU this is."""
        node = ray.get_runtime_context().get_node_id()
        with Path(self._mapping["output"]).with_suffix(f".{node}").open("a") as told:
            told.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        super().make_units(*arguments)


class DyingMaker(HashMaker):
    """One whose process ends in the middle of its work."""

    def make_units(self, *arguments):
        os._exit(1)


class BlindMaker(HashMaker):
    """One on a node that does not see the driver's folder."""

    def __init__(self, config, folder, name):
        super().__init__(config, f"{folder}/gone", name)
