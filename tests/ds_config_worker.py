"""One rank that takes two optimizer steps of a toy model under each DeepSpeed JSON it is given."""

import contextlib
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from lcm_ds import ds_config
from lcm_ds.config import TrainConfig

CONFIG = TrainConfig.model_validate(
    {
        "run_dir": "unused",
        "model": {"preset": "quickstart"},
        "data": {"train": "unused"},
        "batch": {"rows_per_step": 8, "micro_batch_rows": 2},
        "optim": {"lr": 1e-2},
        "steps": 1,
        "deepspeed": "unused",
    }
)


def step(mapping):
    """(loss before, loss after, gradient norm) of a step on fixed data, two micro-batches a rank."""
    resolved = ds_config.resolve(mapping, CONFIG, dist.get_world_size(), "json", hidden_size=32)
    partitioned = ds_config.zero_stage(resolved) == 3
    with deepspeed.zero.Init(config_dict_or_path=resolved) if partitioned else contextlib.nullcontext():
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    for number, parameter in enumerate(model.parameters()):
        gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if partitioned else None
        with gathered or contextlib.nullcontext():
            fixed = torch.randn(getattr(parameter, "ds_shape", parameter.shape), generator=seeded(number)) / 4
            if parameter.data.numel():
                parameter.data.copy_(fixed)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=resolved)
    rows = torch.randn(2, 2 * dist.get_world_size(), 8, generator=seeded(99))
    mine = rows[:, 2 * dist.get_rank() : 2 * dist.get_rank() + 2].to(next(engine.module.parameters()).dtype)
    losses, norms = [], []
    for _ in range(2):
        total = torch.zeros(())
        for batch in mine:
            loss = (engine(batch).float() - batch.float().roll(1, dims=-1)).square().mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach() / 2
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        norms.append(float(engine.get_global_grad_norm()))
    engine.destroy()
    return losses[0], losses[1], norms[0]


def seeded(number):
    return torch.Generator().manual_seed(number)


if __name__ == "__main__":
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    moved = {Path(path).stem: step(ds_config.read(path)) for path in sys.argv[2:]}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(moved))
    dist.destroy_process_group()
