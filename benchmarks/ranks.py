"""Steps of two CPU ranks of a thread each: ZeRO 1 to 3 and torch's DDP, against one rank of two threads.

python benchmarks/ranks.py [--stages 1 2 3] [--rows 16] [--row-length 128] [--steps 10] [--repeats 2]

The model of benchmarks/train_step.py in bf16 with fp32 masters, dropout included; a step's rows are dealt to the ranks.
`lcm-ds` is `lcm-ds launch --local` with ds_configs/zeroN_bf16.json, loader and logging included: the step a run logs.
DDP is the bare model in torch's DistributedDataParallel over gloo, gradients in bf16. All ways take turns; shown is the
median over all steps but three of each run, and of the ratios to DDP of the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from loader import write_dataset
from torch.nn.parallel import DistributedDataParallel
from train_step import SMALL, bare, pack

from lcm_ds.distributed.environment import free_port
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.processes import keep_freed_memory

ROOT = Path(__file__).parent.parent
WARM_UP = 3


def main() -> None:
    """Measure all ways in turn; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=16, help="of a step, of all ranks")
    parser.add_argument("--row-length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=SMALL["num_hidden_layers"])
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each run, after three for warm-up")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # of this process and all that it starts
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        write_dataset(data, 50_000, SMALL["embed_dim"], 100, arguments.row_length)
        ways: dict[str, Callable[[], list[float]]] = {
            "DDP of torch, 2 ranks": lambda: by_ddp(arguments),
            "lcm-ds, ZeRO-1, 1 rank of 2 threads": lambda: by_lcm_ds(arguments, data, 1, 1),
        }
        for stage in arguments.stages:
            ways[f"lcm-ds, ZeRO-{stage}, 2 ranks"] = lambda stage=stage: by_lcm_ds(arguments, data, stage, 2)
        times: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, run in ways.items():
                times[name].append(run())
    concepts = arguments.rows * arguments.row_length
    turns = {name: [statistics.median(steps) for steps in runs] for name, runs in times.items()}
    ddp = next(iter(turns.values()))
    print(f"torch {torch.__version__}; {concepts:,} concepts a step, {arguments.repeats} turns")
    print("| way | step (s, median) | concepts/s | speed, of DDP |\n| --- | ---: | ---: | ---: |")
    for name, medians in turns.items():
        seconds = statistics.median(step for steps in times[name] for step in steps)
        ratio = statistics.median(other / own for other, own in zip(ddp, medians, strict=True))
        print(f"| {name} | {seconds:.4f} | {concepts / seconds:,.0f} | {ratio:.2f} |")


def by_lcm_ds(arguments: argparse.Namespace, data: Path, stage: int, ranks: int) -> list[float]:
    """Seconds of the steps that a run logs.

    Args:
        arguments: Of the command line.
        data: The dataset.
        stage: Of ZeRO.
        ranks: Of the run, on this host.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run_dir": folder, "data.train": data, "data.validation": "null", "data.row_length": arguments.row_length,
            "data.max_segment": arguments.row_length, "batch.rows_per_step": arguments.rows,
            "batch.micro_batch_rows": arguments.rows // ranks, "steps": arguments.steps + WARM_UP,
            "optim.schedule.warmup_steps": 1, "checkpoint.every": "null", "log.every": 1, "log.samples": 0,
            "deepspeed": f"ds_configs/zero{stage}_bf16.json", **{f"model.{name}": size for name, size in SMALL.items()},
            "model.num_hidden_layers": arguments.layers, "model.dropout": 0.1,
        }  # fmt: skip
        overrides = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "lcm_ds.cli", "launch", "--local", str(ranks), "configs/train/quickstart.yaml"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("OMP_NUM_THREADS", None)  # the launcher deals the cores
        subprocess.run([*command, *overrides], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [line["step_time"] for line in lines if "step_time" in line][WARM_UP : arguments.steps + WARM_UP]


def by_ddp(arguments: argparse.Namespace) -> list[float]:
    """Seconds of the steps of torch's DDP, on rank 0."""
    context = torch.multiprocessing.get_context("spawn")
    found, port = context.SimpleQueue(), free_port()
    torch.multiprocessing.start_processes(_ddp_rank, (arguments, port, found), nprocs=2, start_method="spawn")
    return list(found.get())


def _ddp_rank(rank: int, arguments: argparse.Namespace, port: int, found: torch.multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    device, rows = torch.device("cpu"), arguments.rows // 2
    config = BaseLCMConfig(**{**SMALL, "num_hidden_layers": arguments.layers}, dropout=0.1)
    batch = pack([arguments.row_length] * rows, rows, arguments.row_length, config, device)
    step = bare(
        BaseLCM(config).initialize(0),
        batch,
        torch.bfloat16,
        device,
        wrap=DistributedDataParallel,
    )
    times = []
    for _ in range(arguments.steps + WARM_UP):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    if rank == 0:
        found.put(times[WARM_UP:])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
