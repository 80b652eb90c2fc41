"""One rank that saves while it trains, loads the checkpoint, and gets values that are not finite.

python saving_worker.py FOLDER NAMES: for each named ZeRO stage and precision it takes steps of a tiny Base-LCM, one of
them with a NaN in the rows of rank 1, saves in the background, goes on, and does the same from the checkpoint;
FOLDER/results.json has what it saw.
"""

import contextlib
import gc
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist
from steps_worker import CONFIG, EMBED_DIM, ENDLESS, ROWS, batches
from whole_way_worker import live_masters

from lcm_ds import deepspeed_config
from lcm_ds.checkpoint import load as resume
from lcm_ds.checkpoint.format import Checkpoint, folder_name, fp32_weights
from lcm_ds.checkpoint.save import Saver
from lcm_ds.config import CheckpointConfig, TrainConfig
from lcm_ds.data.plan import Plan
from lcm_ds.distributed.environment import detect_environment
from lcm_ds.model.config import resolve_model
from lcm_ds.model.sizes import count_parameters
from lcm_ds.processes import exit_with
from lcm_ds.train.engine import build_engine, build_model, init_distributed
from lcm_ds.train.job import TrainJob
from lcm_ds.train.memory import background_copy
from lcm_ds.train.run_metadata import identity
from lcm_ds.train.step import Stepper

SAVED_AT, LAST, POISONED = 3, 6, 1
PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
MUON = {"optimizer": {"type": "Muon", "params": {"lr": "auto"}}}
VARIANTS = {
    **{
        f"zero {stage}, {name}": {"zero_optimization": {"stage": stage}, **block}
        for stage in (0, 1, 2, 3)
        for name, block in PRECISIONS.items()
    },
    **{f"zero {stage}, offloaded": {"zero_optimization": {"stage": stage, **OFFLOADED}} for stage in (2, 3)},
    **{
        f"zero {stage}, bf16, gradients in fp32": {
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        for stage in (1, 2, 3)
    },
    "zero 1, Muon": {"zero_optimization": {"stage": 1}, **MUON},
    "zero 0, bf16, Muon": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}, **MUON},
    "zero 1, bf16, Muon, gradients in fp32": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        **MUON,
    },
    "zero 2, bf16, parameters in turn": {
        "zero_optimization": {"stage": 2, "round_robin_gradients": True},
        "bf16": {"enabled": True},
    },
}
# Conversions: every stage into every other one.
CONVERTED = {f"zero {stage}, fp32": [f"zero {other}, fp32" for other in {1, 2, 3} - {stage}] for stage in (1, 2, 3)}
CONVERTED["zero 1, bf16, gradients in fp32"] = ["zero 3, bf16, gradients in fp32"]
NORMALIZER = (torch.zeros(EMBED_DIM).numpy(), torch.ones(EMBED_DIM).numpy())


CHANGED = {"weight_decay": 0.7, "betas": [0.5, 0.6], "eps": 0.1}


def build(deepspeed, env, device, **optim):
    config = TrainConfig.model_validate({**CONFIG, "deepspeed": deepspeed, "optim": {**CONFIG["optim"], **optim}})
    model_config = resolve_model(config.model)
    ds = deepspeed_config.resolve(deepspeed_config.read(deepspeed), config, env.world_size, "json", hidden_size=32)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(build_model(model_config, NORMALIZER, config.seed, ds), config, ds)
    plan = Plan([ENDLESS], config.seed, ROWS, CONFIG["data"]["row_length"])
    return Stepper(TrainJob(config, ds, model_config, [], None, plan, ""), env, engine, device)


def weights(stepper):
    """A checksum of all master weights."""
    digest = hashlib.sha256()
    for master in live_masters(stepper.engine).values():
        digest.update(master.numpy().tobytes())
    return digest.hexdigest()


def steps(stepper, first, last):
    upcoming = [batch for batch in batches(stepper.env, CONFIG["batch"]["micro_batch_rows"]) if first <= batch.step]
    upcoming = map(stepper.prepare, upcoming)
    return [stepper.step(upcoming, step).read().loss for step in range(first, last)]


def poisoned(stepper, step):
    """A step with one NaN, in a target of rank 1: (loss, whether it was applied, whether the weights are unchanged)."""
    upcoming = [batch for batch in batches(stepper.env, CONFIG["batch"]["micro_batch_rows"]) if batch.step == step]
    if stepper.env.rank == 1:
        upcoming[0].concepts[0, 3, 0] = torch.nan
    before = weights(stepper)
    outcome = stepper.step(map(stepper.prepare, upcoming), step).read()
    return str(outcome.loss), outcome.applied, weights(stepper) == before


def variant(name, folder, env, device):
    deepspeed = VARIANTS[name]
    stepper = build(deepspeed, env, device)
    steps(stepper, 0, POISONED)
    result = {"poisoned": poisoned(stepper, POISONED), "skipped": stepper.engine.skipped_steps}
    steps(stepper, POISONED, SAVED_AT)
    masters = live_masters(stepper.engine)
    rounded = {key: parameter.detach().clone() for key, parameter in stepper.engine.module.named_parameters()}
    saver = Saver(stepper.engine, folder, CheckpointConfig(), background=True)
    goes_on = Event()
    saver._writer.submit(goes_on.wait)  # nothing is written before the weights have changed
    saver.save_async(SAVED_AT, {"step": SAVED_AT, **identity(stepper.job, env)})
    copied, parameters = saver._files.host_buffer.copied, count_parameters(stepper.job.model)
    result["copied"] = copied / background_copy(parameters, stepper.job.ds, env.world_size)
    result["went on"] = steps(stepper, SAVED_AT, LAST)
    result["busy"] = saver.busy()
    goes_on.set()
    result["saved"] = saver.commit()
    saver.close()
    result["weights"] = weights(stepper)
    stepper.engine.destroy()
    stepper = build(deepspeed, env, device)
    checkpoint = Checkpoint(folder / "checkpoints" / folder_name(SAVED_AT), SAVED_AT)
    assert resume.newest_complete(folder, CheckpointConfig()) == checkpoint
    read = fp32_weights(checkpoint)
    if "in turn" in name:  # DeepSpeed itself confuses the masters; the half-precision weights are right
        assert all(torch.equal(read[key].bfloat16(), value) for key, value in rounded.items())
    else:
        assert set(masters) | {"normalizer.center", "normalizer.scale"} == set(read)
        result["read"] = [key for key, master in masters.items() if not torch.equal(read[key], master)]
    resume.restore(stepper.engine, checkpoint, universal=False)
    result["again"] = steps(stepper, SAVED_AT, LAST)
    result["weights again"] = weights(stepper)
    stepper.engine.destroy()
    result["changed"] = changed(checkpoint, deepspeed, env, device)
    result["converted"] = {other: converted(checkpoint, other, env, device) for other in CONVERTED.get(name, [])}
    return result


def changed(checkpoint, deepspeed, env, device):
    """Optimizer settings of a resumed engine and of a new one, if the config has changed."""
    stepper = build(deepspeed, env, device, **CHANGED, max_grad_norm=0.0 if "optimizer" in deepspeed else 0.3)
    new = settings(stepper.engine)
    resume.restore(stepper.engine, checkpoint, universal=False)
    resumed = settings(stepper.engine)
    steps(stepper, SAVED_AT, SAVED_AT + 1)
    result = {"new": new, "resumed": resumed, "after a step": settings(stepper.engine)}
    stepper.engine.destroy()
    return result


def settings(engine):
    """Settings of each parameter group, and the clipping norm."""
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "step", "lr")}
        for group in engine.basic_optimizer.param_groups
    ]
    return [groups, getattr(engine.optimizer, "clip_grad", None)]


def converted(checkpoint, name, env, device):
    """The losses after the checkpoint, under another ZeRO stage."""
    with contextlib.redirect_stdout(io.StringIO()):
        resume.convert(checkpoint, 10_000, CheckpointConfig(), lambda doing: None, print)
    stepper = build({**VARIANTS[name], "checkpoint": {"load_universal": True}}, env, device)
    resume.restore(stepper.engine, checkpoint, universal=True)
    losses = steps(stepper, SAVED_AT, LAST)
    groups = stepper.engine.basic_optimizer.param_groups
    stepper.engine.destroy()
    return {"losses": losses, "weight decay": [group["weight_decay"] for group in groups]}


def main():
    folder, names = Path(sys.argv[1]), json.loads(sys.argv[2])
    env = detect_environment(os.environ)
    device = init_distributed(env)
    gc.freeze()  # as a run does
    results = {name: variant(name, folder / name.replace(" ", "_"), env, device) for name in names}
    if env.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    exit_with(main)
