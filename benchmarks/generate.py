"""Generation with a KV cache, compared with recomputing everything for each concept, and its time by length.

python benchmarks/generate.py                                       # CPU: 512 wide, 8 layers (28.4 M parameters)
python benchmarks/generate.py --preset 150m --ways lengths          # a larger model, only its time by length
python benchmarks/generate.py --preset 1.6b --dtype bfloat16 --repeats 5    # one GPU: the paper's model

Both start from one random concept and generate the same number, without stop rules; recomputing runs the model over
all concepts so far for each new one. The time by length is that of one new concept when the cache holds that many:
medians over rounds in which all lengths take turns, so that other load on the machine affects all of them.
--cpu-time measures processor time instead of wall-clock time: with --threads 1 both agree on an idle machine, and only
processor time is meaningful on a busy one.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from train_step import SMALL

from lcm_ds.config import ModelConfig
from lcm_ds.encoders.base import resolve_device
from lcm_ds.generate.sampler import generate
from lcm_ds.model.attention import Cache
from lcm_ds.model.config import resolve_model
from lcm_ds.model.modeling import BaseLCM

LENGTHS = (32, 64, 128, 256, 512)
STEPS = 8  # timed together

clock = time.perf_counter


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="default: 512 wide, 8 layers")
    parser.add_argument("--concepts", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of generation; recomputing is timed once")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the time by length")
    parser.add_argument("--ways", nargs="+", default=["ratio", "lengths"], choices=("ratio", "lengths"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads; default: one per core"
    )
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time; use with --threads 1")
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time: is the time of one thread: add --threads 1")
    global clock
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    device = resolve_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    sizes = {"preset": arguments.preset} if arguments.preset else SMALL
    with device:
        model = BaseLCM(resolve_model(ModelConfig.model_validate(sizes))).to(getattr(torch, arguments.dtype)).eval()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{arguments.threads} CPU threads"
    print(f"{model.num_parameters():,} parameters, {arguments.dtype}, {hardware}, torch {torch.__version__}, Python "
          f"{platform.python_version()}\n")  # fmt: skip
    if "ratio" in arguments.ways:
        print("| prompts | way | seconds | concepts/s | ratio |\n| ---: | --- | ---: | ---: | ---: |")
        for batch in arguments.batches:
            print_ratio(model, batch, arguments.concepts, arguments.repeats)
        print()
    if "lengths" in arguments.ways:
        print("| prompts | concepts before | ms a concept and prompt | of that at 32 |\n| ---: | ---: | ---: | ---: |")
        for batch in arguments.batches:
            print_lengths(model, batch, arguments.rounds)


def print_ratio(model: BaseLCM, batch: int, concepts: int, repeats: int) -> None:
    """Rows of a table: recomputing and caching."""
    prompts = list(torch.randn(batch, 1, model.config.embed_dim, device=model.normalizer.center.device))
    generate(model, prompts, 4, stop_end=None, stop_repeat=None)  # warm up
    cached = statistics.median(
        timed(lambda: generate(model, prompts, concepts, stop_end=None, stop_repeat=None), model)
        for _ in range(repeats)
    )
    recomputed = timed(lambda: recompute(model, torch.stack(prompts), concepts), model)
    for way, seconds in (("recomputing", recomputed), ("cached", cached)):
        print(
            f"| {batch} | {way} | {seconds:.2f} | {batch * concepts / seconds:,.0f} | {recomputed / seconds:.1f} |",
            flush=True,
        )


@torch.inference_mode()
def recompute(model: BaseLCM, seen: Tensor, concepts: int) -> Tensor:
    """Generate without a cache: [prompts, n, embed_dim] → the same with `concepts` more."""
    for _ in range(concepts):
        concept = model.normalizer.denormalize(model(seen)[:, -1:])
        seen = torch.cat([seen, concept], dim=1)
    return seen


@torch.inference_mode()
def print_lengths(model: BaseLCM, batch: int, rounds: int) -> None:
    """Rows of a table: the time of one more concept per prompt, by the number of concepts before it."""
    caches = {length: Cache() for length in LENGTHS}
    for length, cache in caches.items():
        # halfway through the timed steps the cache holds `length` concepts
        model(
            torch.randn(batch, length - STEPS // 2, model.config.embed_dim, device=model.normalizer.center.device),
            cache=cache,
        )
    new = torch.randn(batch, 1, model.config.embed_dim, device=model.normalizer.center.device)
    times: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for round in range(rounds + 1):
        for length, cache in caches.items():
            start = torch.full((batch,), length - STEPS // 2)
            cache.truncate(start)
            seconds = timed(lambda cache=cache: [model(new, cache=cache) for _ in range(STEPS)], model)  # type: ignore[misc]
            if round:  # the first round warms up and allocates memory
                times[length].append(seconds / STEPS / batch)
    base = statistics.median(times[LENGTHS[0]])
    for length, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"| {batch} | {length} | {1000 * middle:.2f} | {middle / base:.2f} |", flush=True)


def timed(run: Callable[[], object], model: BaseLCM) -> float:
    """Seconds of a call."""
    wait = torch.cuda.synchronize if model.normalizer.center.device.type == "cuda" else lambda: None
    wait()
    start = clock()
    run()
    wait()
    return clock() - start


if __name__ == "__main__":
    main()
