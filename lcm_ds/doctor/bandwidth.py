"""`lcm-ds doctor --bandwidth`: the speed of an all-reduce over all devices of a run. Each worker runs this module."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from lcm_ds.distributed.environment import detect_environment
from lcm_ds.processes import exit_with
from lcm_ds.train.engine import init_distributed

# Bytes; the largest is about the size of a ZeRO bucket.
SIZES = {"cpu": (1 << 20, 1 << 24), "accelerator": (1 << 20, 1 << 25, 1 << 30)}
REPEATS = 5


def measure(size: int, device: torch.device) -> float:
    """Seconds of an all-reduce of `size` bytes in fp32: the best of a few, after a warm-up."""
    values = torch.ones(size // 4, device=device)
    best = float("inf")
    for repeat in range(REPEATS + 1):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        if repeat:
            best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    """Rank 0 prints a line for each size.

    Bandwidths are defined as in NCCL's tests: of the algorithm, bytes by time; of the bus, that times 2 (n - 1) / n,
    which does not depend on the number of ranks n and can be compared with the hardware's.
    """
    env = detect_environment(os.environ)
    device = init_distributed(env, stall_minutes=0.0)
    for size in SIZES["cpu" if device.type == "cpu" else "accelerator"]:
        seconds = measure(size, device)
        if env.rank == 0:
            algorithm = size / seconds / 1e9
            bus = algorithm * 2 * (env.world_size - 1) / env.world_size
            print(
                f"all-reduce    {size / 2**20:.0f} MiB over {env.world_size} ranks ({dist.get_backend()}): "
                f"{1000 * seconds:.2f} ms, algorithm {algorithm:.3g} GB/s, bus {bus:.3g} GB/s",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    exit_with(main)
