"""A run of one rank that records the operations it calls.

python operations_worker.py CONFIG.yaml OUT.json: OUT has "operations" (their names; for those whose determinism depends
on it, with the kind of their arguments) and "settings" at the first of them.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_ds.processes import exit_with
from lcm_ds.train import main


def settings():
    """What `train.deterministic` sets."""
    from torch._inductor import config as inductor

    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "inductor": inductor.deterministic,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
    }


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations, self.settings = set(), None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if name in ("cumsum", "cumsum_", "cumprod") and args[0].is_floating_point():
            name += " of floats"
        if name == "bincount" and isinstance(args[1] if len(args) > 1 else kwargs.get("weights"), torch.Tensor):
            name += " with weights"
        self.operations.add(name)
        if self.settings is None:
            self.settings = settings()
        return func(*args, **kwargs)


def run():
    config, out = sys.argv[1:]
    with Recorder() as recorder:
        code = main(config)
    Path(out).write_text(json.dumps({"operations": sorted(recorder.operations), "settings": recorder.settings}))
    return code


if __name__ == "__main__":
    exit_with(run)
