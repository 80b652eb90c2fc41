"""One rank that saves while it trains, loads what it saved, and is given numbers that are not finite.

python saving_worker.py FOLDER: for each ZeRO stage and precision it takes steps of a tiny Base-LCM, one of them with a
NaN in the rows of rank 1, saves in the background, goes on, and does the same from the checkpoint; FOLDER/results.json
has what it saw.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from steps_worker import CONFIG, EMBED_DIM, ROWS, batches

from lcm_ds import ds_config
from lcm_ds.config import CheckpointConfig, TrainConfig
from lcm_ds.data.plan import Plan, Source
from lcm_ds.model.config import resolve_model
from lcm_ds.train import resume
from lcm_ds.train.check import Job
from lcm_ds.train.checkpoint import Checkpoint, folder_name
from lcm_ds.train.engine import build_engine, build_model, connect
from lcm_ds.train.place import read_place
from lcm_ds.train.save import Saver
from lcm_ds.train.step import Stepper

SAVED_AT, LAST, POISONED = 3, 6, 1
PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
VARIANTS = {
    **{
        f"zero {stage}, {name}": {"zero_optimization": {"stage": stage}, **block}
        for stage in (0, 1, 2, 3)
        for name, block in PRECISIONS.items()
    },
    **{f"zero {stage}, offloaded": {"zero_optimization": {"stage": stage, **OFFLOADED}} for stage in (2, 3)},
    "zero 1, Muon": {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Muon", "params": {"lr": "auto"}}},
}
NORMALIZER = (torch.zeros(EMBED_DIM).numpy(), torch.ones(EMBED_DIM).numpy())


def build(deepspeed, place, device):
    config = TrainConfig.model_validate({**CONFIG, "deepspeed": deepspeed})
    model_config = resolve_model(config.model)
    ds = ds_config.resolve(ds_config.read(deepspeed), config, place.world_size, "json", hidden_size=32)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(build_model(model_config, NORMALIZER, config.seed, ds), config, ds)
    plan = Plan([Source([1_000_000])], config.seed, ROWS, CONFIG["data"]["row_length"])
    return Stepper(Job(config, ds, model_config, [], None, plan, ""), place, engine, device)


def weights(stepper):
    """A checksum of all master weights."""
    digest = hashlib.sha256()
    for parameter in stepper.engine.module.parameters():
        full = safe_get_full_fp32_param(parameter)
        digest.update((parameter.detach() if full is None else full).float().numpy().tobytes())
    return digest.hexdigest()


def steps(stepper, first, last):
    coming = [batch for batch in batches(stepper.place, CONFIG["batch"]["micro_batch_rows"]) if first <= batch.step]
    coming = iter(coming)
    return [stepper.step(coming, step).loss for step in range(first, last)]


def poisoned(stepper, step):
    """A step with one NaN, in a target of rank 1: (loss, whether it was applied, whether weights are as they were)."""
    coming = [batch for batch in batches(stepper.place, CONFIG["batch"]["micro_batch_rows"]) if batch.step == step]
    if stepper.place.rank == 1:
        coming[0].concepts[0, 3, 0] = torch.nan
    before = weights(stepper)
    outcome = stepper.step(iter(coming), step)
    return str(outcome.loss), outcome.applied, weights(stepper) == before


def variant(deepspeed, folder, place, device):
    stepper = build(deepspeed, place, device)
    steps(stepper, 0, POISONED)
    result = {"poisoned": poisoned(stepper, POISONED), "skipped": stepper.engine.skipped_steps}
    steps(stepper, POISONED, SAVED_AT)
    saver = Saver(stepper.engine, folder, CheckpointConfig(), background=True)
    saver.begin(SAVED_AT, {"step": SAVED_AT})
    result["went on"] = steps(stepper, SAVED_AT, LAST)
    result["saved"] = saver.finish()
    saver.close()
    result["weights"] = weights(stepper)
    stepper.engine.destroy()
    stepper = build(deepspeed, place, device)
    checkpoint = Checkpoint(folder / "checkpoints" / folder_name(SAVED_AT), SAVED_AT)
    assert resume.newest_whole(folder, CheckpointConfig()) == checkpoint
    resume.restore(stepper.engine, checkpoint, universal=False)
    result["again"] = steps(stepper, SAVED_AT, LAST)
    result["weights again"] = weights(stepper)
    stepper.engine.destroy()
    return result


def main():
    folder = Path(sys.argv[1])
    place = read_place(os.environ)
    device = connect(place)
    results = {
        name: variant(deepspeed, folder / name.replace(" ", "_"), place, device) for name, deepspeed in VARIANTS.items()
    }
    if place.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
