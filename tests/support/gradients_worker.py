"""One rank that takes steps under each of some variants, with DeepSpeed's own sums and norms of gradients or lcm-ds's.

python gradients_worker.py deepspeed|norms|lcm-ds VARIANTS.json RESULTS.json: the norms alone are lcm-ds's with "norms";
the variants are name → changes of a train config (steps_worker.py), with `piece`, the most elements that are sent as
one, `all-reduced`, whether ranks exchange all sums, as on GPUs, and `frozen`: a parameter, the micro-batch of step
FROZEN from which on it has no gradient, and the ranks on which this is so; the results name → losses, norms, skipped
steps, norms of the weights, the operations in the optimizer's last step, each rank's last norms, the elements of each
piece that was sent before the backward pass of the last step had ended, how many pieces were under way at
most, and whether lcm-ds took the gradients. A value of step NONFINITE is infinite, on one rank.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import replace
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
from lcm_ds.train.gradients import reduction
from lcm_ds.train.job import TrainJob
from lcm_ds.train.step import Stepper

NONFINITE, FROZEN = 2, 3  # steps


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def take_steps(changes, env, device):
    changes = dict(changes)
    reduction.PIECE, frozen = changes.pop("piece", 1 << 24), changes.pop("frozen", None)
    all_reduced, over_gloo = changes.pop("all-reduced", False), reduction._over_gloo
    blocks = {key: CONFIG.get(key, {}) | value for key, value in changes.items() if key != "deepspeed"}
    config = TrainConfig.model_validate(CONFIG | changes | blocks)
    model_config = resolve_model(config.model)
    ds = deepspeed_config.resolve(deepspeed_config.read(config.deepspeed), config, env.world_size, "json")
    normalizer = (torch.zeros(EMBED_DIM).numpy(), torch.ones(EMBED_DIM).numpy())
    if all_reduced:  # as on GPUs
        reduction._over_gloo = lambda group: False
    engine = engines.build_engine(engines.build_model(model_config, normalizer, config.seed, ds), config, ds)
    job = TrainJob(config, ds, model_config, [], None, Plan([ENDLESS], config.seed, ROWS, LENGTH), "")
    stepper, counts, step, backward = Stepper(job, env, engine, device), None, engine.step, engine.backward
    ended = (engine, "buffered_allreduce_fallback")  # what is called when a backward pass has ended
    if hasattr(engine.optimizer, "independent_gradient_partition_epilogue"):
        ended = (engine.optimizer, "independent_gradient_partition_epilogue")
    sent, before, send, finish = [], [], reduction.Reduction._send, getattr(*ended)
    under_way, most = 0, 0
    taken = isinstance(getattr(getattr(finish, "func", finish), "__self__", None), reduction.Reduction)

    def counted_step():
        nonlocal counts
        if engine.is_gradient_accumulation_boundary():
            with Counts() as counts:
                step()
        else:
            step()

    def counted_send(self, piece):
        nonlocal under_way, most
        sent.append(piece.size)
        receive = send(self, piece)
        under_way += 1
        most = max(most, under_way)

        def counted_receive():
            nonlocal under_way
            under_way -= 1
            return receive()

        return counted_receive

    def counted_finish(*args, **kwargs):
        before[:] = sent
        finish(*args, **kwargs)

    def freeze(step, micro_batch):
        if frozen is not None and env.rank in frozen[2]:
            parameter = engine.module.get_parameter(frozen[0])
            parameter.requires_grad_(step != FROZEN or micro_batch < frozen[1])

    def backward_and_freeze(*args, **kwargs):
        backward(*args, **kwargs)
        freeze(index, 1 + engine.micro_steps % engine.gradient_accumulation_steps())

    engine.step, engine.backward = counted_step, backward_and_freeze
    setattr(*ended, counted_finish)
    reduction.Reduction._send = counted_send
    upcoming, losses, norms = batches(env, config.batch.micro_batch_rows), [], []
    for index in range(STEPS // 2):
        if index == NONFINITE:
            upcoming = with_infinity(upcoming)
        freeze(index, 0)
        sent.clear()
        losses.append(stepper.step(map(stepper.prepare, upcoming), index).read().loss)
        norms.append(float(engine.get_global_grad_norm()))
    weights = {
        name: (parameter if (full := safe_get_full_fp32_param(parameter)) is None else full).double().norm().item()
        for name, parameter in engine.module.named_parameters()
    }
    skipped, of_ranks = engine.skipped_steps, [None] * env.world_size
    reduction.Reduction._send, reduction._over_gloo = send, over_gloo
    dist.all_gather_object(of_ranks, norms[-2:])
    engine.destroy()
    found = {"losses": losses, "norms": norms, "skipped": skipped, "weights": weights}
    found |= {"calls": counts.calls, "sent": before, "norms of ranks": of_ranks}
    return {**found, "most under way": most, "taken by lcm-ds": taken}


def with_infinity(upcoming):
    """The same batches, but the first one holds an infinite value, on rank 0 only."""
    for number, batch in enumerate(upcoming):
        if number == 0 and dist.get_rank() == 0:
            concepts = batch.concepts.clone()
            concepts[0, 0, 0] = torch.inf
            batch = replace(batch, concepts=concepts)
        yield batch


def main():
    whose, variants_path, results_path = sys.argv[1:]
    env = detect_environment(os.environ)
    device = engines.init_distributed(env)
    if whose == "deepspeed":
        engines.fuse_norms = lambda optimizer: None
    if whose != "lcm-ds":
        engines.reduce_in_backward = lambda engine: None
    variants = json.loads(Path(variants_path).read_text())
    results = {name: take_steps(changes, env, device) for name, changes in variants.items()}
    if env.rank == 0:
        Path(results_path).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    exit_with(main)
