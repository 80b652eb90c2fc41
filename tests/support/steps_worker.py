"""One rank that takes ten steps of a tiny Base-LCM, by the real loop, under each of some variants.

python steps_worker.py VARIANTS.json RESULTS.json GRADIENTS.safetensors: the variants are name → changes of a train
config; the results name → the losses of its steps and the histograms at the first, or why it was refused. The
gradients of the first step, "NAME/PARAMETER" each, are those of the global batch.
"""

import contextlib
import gc
import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig
from lcm_ds.data.batch import Batch
from lcm_ds.data.plan import Plan, Source
from lcm_ds.distributed.environment import detect_environment
from lcm_ds.errors import InputError
from lcm_ds.model.config import resolve_model
from lcm_ds.processes import exit_with
from lcm_ds.train.engine import build_engine, build_model, choose_kernels, init_distributed
from lcm_ds.train.job import TrainJob
from lcm_ds.train.monitoring.histograms import histograms
from lcm_ds.train.step import Stepper

STEPS, ROWS, LENGTH, EMBED_DIM = 10, 8, 16, 12
CONFIG = {
    "run_dir": "unused",
    "seed": 3,
    "model": {
        "embed_dim": EMBED_DIM,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "dropout": 0.1,
        "initializer_range": 0.1,
    },
    "data": {"train": "unused", "row_length": LENGTH, "max_segment": 8},
    "batch": {"rows_per_step": ROWS, "micro_batch_rows": 4},
    "optim": {"lr": 1.0e-2, "weight_decay": 0.1, "max_grad_norm": 0.0, "schedule": {"name": "constant"}},
    "steps": STEPS,
    "deepspeed": {"zero_optimization": {"stage": 1}},
}


# The data of a plan whose rows nobody reads.
ENDLESS = Source([1_000_000], [1], lambda shard: np.array([1_000_000]), longest=8)


def rows():
    """The global batch, the same in every step: fp16 concepts and segments of several lengths, two rows padded."""
    generator = torch.Generator().manual_seed(1)
    concepts = torch.randn(ROWS, LENGTH, EMBED_DIM, generator=generator).half()
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
    for row, first in enumerate(range(1, 9)):
        ids[row, first:] = 1
        ids[row, first + 7 :] = 2
    ids[2, 10:] = ids[5, 4:] = -1
    concepts[ids < 0] = 0
    return concepts, ids


def batches(env, micro_batch_rows):
    """This rank's micro-batches of every step, as from the loader."""
    concepts, ids = rows()
    own_rows = ROWS // env.world_size
    for step in range(STEPS):
        for index in range(own_rows // micro_batch_rows):
            first = env.rank * own_rows + index * micro_batch_rows
            part = slice(first, first + micro_batch_rows)
            yield Batch(concepts[part], ids[part], step, index, first)


def take_steps(changes, env, device, normalizer):
    """(losses of the steps over all ranks, name → gradient and group → histogram at the first step)."""
    blocks = {key: CONFIG.get(key, {}) | value for key, value in changes.items() if key != "deepspeed"}
    config = TrainConfig.model_validate(CONFIG | changes | blocks)
    model_config = resolve_model(config.model)
    read = deepspeed_config.read(config.deepspeed)
    ds = deepspeed_config.resolve(read, config, env.world_size, "json", hidden_size=model_config.hidden_size)
    deepspeed_config.check_device(ds, "json")
    model = build_model(model_config, normalizer, config.seed, ds)
    engine = build_engine(model, config, ds)
    plan = Plan([ENDLESS], config.seed, ROWS, LENGTH)
    job = TrainJob(config, ds, model_config, [], None, plan, "")
    choose_kernels(job, device)
    stepper = Stepper(job, env, engine, device)
    gradients, first_histograms, step = {}, {}, engine.step

    def on_gradients_ready():
        first_histograms.update(histograms(engine, counts=env.rank == 0))

    def keep_gradients_and_step():
        if engine.is_gradient_accumulation_boundary() and not gradients:
            for name, parameter in engine.module.named_parameters():
                scale = float(getattr(engine.optimizer, "cur_scale", 1.0))  # the loss scale of fp16
                gradients[name] = safe_get_full_grad(parameter).float() / scale
        step()

    engine.step = keep_gradients_and_step
    upcoming, losses = map(stepper.prepare, batches(env, config.batch.micro_batch_rows)), []
    for index in range(STEPS):
        pending = stepper.step(upcoming, index, on_gradients_ready=on_gradients_ready if index == 0 else None)
        losses.append(pending.read().loss)
    engine.destroy()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    return losses, gradients, {group: asdict(histogram) for group, histogram in first_histograms.items()}


def main():
    variants, results_path, gradients_path = sys.argv[1:]
    env = detect_environment(os.environ)
    device = init_distributed(env)
    gc.freeze()  # as a run does
    generator = torch.Generator().manual_seed(2)
    normalizer = (
        torch.randn(EMBED_DIM, generator=generator).numpy() / 10,
        torch.rand(EMBED_DIM, generator=generator).numpy() + 0.5,
    )
    results, all_gradients = {}, {}
    for name, changes in json.loads(Path(variants).read_text()).items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                losses, gradients, first_histograms = take_steps(changes, env, device, normalizer)
        except InputError as error:
            results[name] = {"refused": error.errors}
            continue
        results[name] = {"losses": losses, "histograms": first_histograms}
        results[name]["imported compiler"] = "torch._dynamo" in sys.modules
        all_gradients |= {f"{name}/{parameter}": gradient.cpu() for parameter, gradient in gradients.items()}
    if env.rank == 0:
        save_file(all_gradients, gradients_path)
        Path(results_path).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    exit_with(main)
