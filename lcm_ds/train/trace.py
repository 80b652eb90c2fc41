"""`lcm-ds trace`: the documents that a step sees, found by arithmetic without training to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcm_ds.config import TrainConfig, load
from lcm_ds.data.cache import Cache
from lcm_ds.data.format import open_dataset
from lcm_ds.data.loader import TraceLine
from lcm_ds.data.loader import trace as trace_steps
from lcm_ds.errors import Collector, InputError
from lcm_ds.quiet import printable
from lcm_ds.train.check import plan_of
from lcm_ds.train.metrics import read_losses

FIRST_WORDS = 8


def trace(
    run: str | Path, overrides: Sequence[str], first: int, last: int | None = None, text: bool = False
) -> list[list[TraceLine]]:
    """Print a line a segment of the steps `first` to `last` (from 0; by default `first` alone); and return them.

    A line has lane, shard, key, concepts, id and first words; over those of a step are its number and, where the run
    has logged it, its loss. run: a run folder, or a train config. text: the sentences of each segment as well.
    Raises InputError where there is neither, or the run has no such step.
    """
    config = load(TrainConfig, Path(run) / "config.yaml" if Path(run).is_dir() else Path(run), overrides)
    mistakes = Collector()
    datasets = []
    skip_bad = config.data.on_bad_shard == "skip"
    cache = Cache.of(config.data.cache_dir, config.data.cache_gb)
    for entry in config.data.train:
        with mistakes:
            datasets.append(open_dataset(entry.path, cache, config.data.verify == "always", sizes=not skip_bad))
    mistakes.raise_if_any()
    plan, _ = plan_of(config, datasets)
    end = min(end for end in (config.steps, plan.steps) if end is not None)
    last = first if last is None else last
    if wrong := [step for step in dict.fromkeys((first, last)) if not 0 <= step < end]:
        raise InputError([f"step {step}: this run has steps 0 to {end - 1}" for step in wrong])
    if last < first:
        raise InputError(f"--range {first} {last}: the last step comes before the first")
    losses = read_losses(Path(config.run_dir) / "metrics.jsonl")
    traced = []
    for step, lines in trace_steps(datasets, plan, config.data.max_segment, range(first, last + 1), skip_bad):
        print(f"step {step}  " + (f"loss {losses[step]:.6g}" if step in losses else "loss not logged"))
        for line in lines:
            _print(line, text)
        traced.append(lines)
    return traced


def _print(line: TraceLine, text: bool) -> None:
    where = f"lane {line.lane:>3}  {line.shard} {line.key}  concepts {line.start}-{line.stop}  {line.id}"
    words = [] if text else " ".join(line.sentences).split()[:FIRST_WORDS]
    print(printable("  ".join([where, *([" ".join(words)] if words else [])])))
    if text:
        for number, sentence in enumerate(line.sentences, start=line.start):
            print(printable(f"    {number:>5}  {sentence}"))
