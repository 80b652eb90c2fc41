"""One rank that takes steps under each of some variants, with DeepSpeed's own gradient norms or with lcm-ds's.

python norms_worker.py deepspeed|lcm-ds VARIANTS.json RESULTS.json: the variants are name → changes of a train config
(steps_worker.py); the results name → losses, norms, skipped steps, norms of the weights, and the operations in the
optimizer's last step. A value of step NONFINITE is infinite, on one rank.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from steps_worker import CONFIG, EMBED_DIM, ENDLESS, LENGTH, ROWS, STEPS, batches
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig
from lcm_ds.data.plan import Plan
from lcm_ds.distributed.environment import detect_environment
from lcm_ds.model.config import resolve_model
from lcm_ds.processes import exit_with
from lcm_ds.train import engine as engines
from lcm_ds.train.job import TrainJob
from lcm_ds.train.step import Stepper

NONFINITE = 2  # step


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def take_steps(changes, env, device):
    blocks = {key: CONFIG.get(key, {}) | value for key, value in changes.items() if key != "deepspeed"}
    config = TrainConfig.model_validate(CONFIG | changes | blocks)
    model_config = resolve_model(config.model)
    ds = deepspeed_config.resolve(deepspeed_config.read(config.deepspeed), config, env.world_size, "json")
    normalizer = (torch.zeros(EMBED_DIM).numpy(), torch.ones(EMBED_DIM).numpy())
    engine = engines.build_engine(engines.build_model(model_config, normalizer, config.seed, ds), config, ds)
    job = TrainJob(config, ds, model_config, [], None, Plan([ENDLESS], config.seed, ROWS, LENGTH), "")
    stepper, counts, step = Stepper(job, env, engine, device), None, engine.step

    def counted_step():
        nonlocal counts
        if engine.is_gradient_accumulation_boundary():
            with Counts() as counts:
                step()
        else:
            step()

    engine.step = counted_step
    upcoming, losses, norms = batches(env, config.batch.micro_batch_rows), [], []
    for index in range(STEPS // 2):
        if index == NONFINITE:
            upcoming = with_infinity(upcoming)
        losses.append(stepper.step(map(stepper.prepare, upcoming), index).read().loss)
        norms.append(float(engine.get_global_grad_norm()))
    weights = {
        name: (parameter if (full := safe_get_full_fp32_param(parameter)) is None else full).double().norm().item()
        for name, parameter in engine.module.named_parameters()
    }
    skipped = engine.skipped_steps
    engine.destroy()
    return {"losses": losses, "norms": norms, "skipped": skipped, "weights": weights, "calls": counts.calls}


def with_infinity(upcoming):
    """The same batches, but the first one holds an infinite value, on rank 0 only."""
    for number, batch in enumerate(upcoming):
        if number == 0 and dist.get_rank() == 0:
            batch.concepts[0, 0, 0] = torch.inf
        yield batch
        batch.concepts.nan_to_num_(posinf=0.0)


def main():
    whose, variants_path, results_path = sys.argv[1:]
    env = detect_environment(os.environ)
    device = engines.init_distributed(env)
    if whose == "deepspeed":
        engines.fuse_norms = lambda optimizer: None
    variants = json.loads(Path(variants_path).read_text())
    results = {name: take_steps(changes, env, device) for name, changes in variants.items()}
    if env.rank == 0:
        Path(results_path).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    exit_with(main)
