"""One rank that runs several trainings in turn, each by the real loop, and keeps the fp32 weights at the end of each.

python whole_way_worker.py PLAN.json FOLDER: the plan is name → config; FOLDER/results.json has name → the exit code or
why the run was refused, FOLDER/NAME.safetensors the live engine's master weights.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from lcm_ds.distributed.environment import detect_environment
from lcm_ds.errors import InputError
from lcm_ds.processes import exit_with
from lcm_ds.train import loop
from lcm_ds.train.engine import init_distributed
from lcm_ds.train.job_builder import build_job
from lcm_ds.train.monitoring.console import set_up_logging
from lcm_ds.train.reliability.stop_signal import StopRequest
from lcm_ds.train.reliability.watchdog import Watchdog


def live_masters(engine):
    """name → fp32 master weight, gathered from all ranks of a live engine; all of them call this."""
    optimizer = engine.optimizer
    unsharded = {}  # ZeRO 0 in half precision: every rank holds them
    if hasattr(optimizer, "fp32_groups"):
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            unsharded.update(zip(weights, masters, strict=True))
    all_masters = {}
    for name, parameter in engine.module.named_parameters():
        full = unsharded[parameter] if parameter in unsharded else safe_get_full_fp32_param(parameter)
        all_masters[name] = (parameter if full is None else full).detach().clone().cpu()
        assert str(all_masters[name].dtype) == "torch.float32", name
    return all_masters


class Trainer(loop.Trainer):
    """Keeps the final weights in `masters`, and releases its engine."""

    def finish(self, done, total):
        Trainer.masters = live_masters(self.engine)
        code = super().finish(done, total)
        self.engine.destroy()
        return code


def train(config, env):
    """The exit code of a run and its masters, or why it was refused."""
    job = build_job(config, [], env.world_size)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    set_up_logging(job.run_dir, env.rank)
    try:
        return loop.train(job, env, StopRequest()), Trainer.masters
    except InputError as error:
        return error.errors, {}


def main():
    plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    env = detect_environment(os.environ)
    device = init_distributed(env)
    loop.Trainer = Trainer
    loop.session = lambda job, env, stop: contextlib.nullcontext((device, Watchdog(None)))  # one for all runs
    results = {}
    for name, config in plan.items():
        results[name], masters = train(config, env)

        if env.rank == 0:
            save_file({key: tensor.contiguous() for key, tensor in masters.items()}, folder / f"{name}.safetensors")
    if env.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    exit_with(main)
