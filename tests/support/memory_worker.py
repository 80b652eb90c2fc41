"""Measures what DeepSpeed allocates on a rank: python memory_worker.py OUT PRECISION …, as one of the ranks of a job.

Rank 0 writes a line of JSON to OUT for each setting: stage, precision, steps, the bucket's elements, and the most bytes
that existed at once while one optimizer step was taken, by PyTorch's own account of its allocations.
"""

import gc
import json
import logging
import os
import sys
from itertools import product

import deepspeed
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lcm_ds.processes import exit_with
from lcm_ds.train.engine import leave_out_kernels_of_inference
from lcm_ds.train.gradients.reduction import reduce_in_backward

WIDTH, LAYERS = 128, 16
PARAMETERS = WIDTH * WIDTH * LAYERS
SHIPPED = "bf16, accumulated in fp32"
PRECISIONS = {
    SHIPPED: {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "bf16": {"bf16": {"enabled": True}},
    "fp32": {},
}


def settings(precisions):
    """DeepSpeed JSONs: small buckets that overlap with the backward pass, and large ones with accumulation."""
    for stage, precision, steps in product(range(4), precisions, (1, 2)):
        if stage == 0 and precision == SHIPPED:
            continue  # refused by DeepSpeed
        zero = {"stage": stage, "overlap_comm": steps == 1}
        zero["reduce_bucket_size"] = WIDTH * WIDTH if steps == 1 else PARAMETERS // 2
        if stage == 3:
            zero |= {"stage3_prefetch_bucket_size": WIDTH * WIDTH, "stage3_param_persistence_threshold": 0}
        yield {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": steps,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
            "zero_optimization": zero,
            **PRECISIONS[precision],
        }


def measure(ds):
    """Bytes at the peak of a step; the least of five, since a busy machine may keep a bucket for longer."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stage = ds["zero_optimization"]["stage"]
        with deepspeed.zero.Init(config_dict_or_path=ds, enabled=stage == 3):
            model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds)
        reduce_in_backward(engine)
        inputs = torch.ones(1, WIDTH, dtype=next(engine.parameters()).dtype)
        for step in range(6):
            gc.collect()
            with record_function(f"step {step}"):
                for _ in range(ds["gradient_accumulation_steps"]):
                    engine.backward(engine(inputs).float().square().mean())
                    engine.step()
    events = list(walk(profiler.profiler.kineto_results.experimental_event_tree()))
    held, peaks = {}, []
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.name.startswith("step "):
            peaks.append(0)
        elif event.name == "[memory]":
            fields = event.extra_fields
            if fields.alloc_size > 0:
                held[fields.ptr] = fields.alloc_size
            else:
                held.pop(fields.ptr, None)  # of an earlier engine, if it is not there
            if peaks:
                peaks[-1] = max(peaks[-1], sum(held.values()))
    engine.destroy()
    return min(peaks[1:])


def walk(events):
    """All of a tree of events."""
    for event in events:
        yield event
        yield from walk(event.children)


def main():
    logging.disable(logging.ERROR)
    leave_out_kernels_of_inference()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    with open(sys.argv[1] if os.environ["RANK"] == "0" else os.devnull, "w") as out:
        for ds in settings(sys.argv[2:]):
            out.write(json.dumps({"ds": ds, "peak": measure(ds)}) + "\n")


if __name__ == "__main__":
    exit_with(main)
