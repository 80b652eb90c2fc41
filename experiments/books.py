"""The experiment on books: what a Base-LCM learns that simpler predictors do not, by data and by size, on two cores.

    python experiments/books.py --corpus 'BOOKS/*.parquet' --output experiment --list
    python experiments/books.py --corpus 'BOOKS/*.parquet' --output experiment --only data-10k
    python experiments/books.py --corpus 'BOOKS/*.parquet' --output experiment
    python experiments/books.py --output experiment --report > docs/results.md

It prepares the corpus, cuts the training sets, and trains and evaluates the points of
configs/experiments/books/points.yaml, one after the other. Whatever is done is skipped: stop it at any time (Ctrl-C, or
the end of a machine's day) and call it again. Learning rates are chosen on training books that no model is trained on;
the validation books are used for the figures only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

sys.path.insert(0, str(Path(__file__).parent))

from books_data import CHOOSING, VALIDATION, Corpus

from lcm_ds.checkpoint.format import find
from lcm_ds.config import Schema, TrainConfig, load, read_yaml, validate
from lcm_ds.errors import InputError
from lcm_ds.evaluate.compare import compare
from lcm_ds.evaluate.run import evaluate
from lcm_ds.files import read_object, write_whole
from lcm_ds.model.flops import training_flops
from lcm_ds.model.sizes import count_parameters, resolve_sizes
from lcm_ds.signals import STOPPED

CONFIGS = Path(__file__).parents[1] / "configs/experiments/books"
START_SECONDS, EVALUATION_SECONDS = 15, 90  # of a run and of an evaluation, for estimates
# Concepts of the training data to fit baselines to: all, as the model; a few where only the model's error is looked at.
EVERY, FEW = 10**9, 10_000
LEAST_CONCEPTS, LEAST_STEPS = 600, 4  # of sets and runs at a small --scale


class Point(Schema):
    """A line of the table of points."""

    part: Literal["data", "size", "paper", "storage"]
    set: str
    concepts: int = Field(gt=0)  # that a run reads
    learning_rates: tuple[float, ...] = ()  # to choose from; none: that of `like`
    choosing_share: float = Field(1.0, gt=0, le=1)  # length of the runs that choose, of the point's
    seeds: int = Field(1, gt=0)
    like: str | None = None  # the point that this one changes, and is compared with
    variant: str = "main"  # of the data: see books_data.py
    changes: tuple[str, ...] = ()  # of train.yaml


class Held(Schema):
    """A set of documents that no model is trained on."""

    share: float = 1.0  # of the training books
    concepts: int = Field(gt=0)


class Table(Schema):
    """points.yaml."""

    sets: dict[str, int | None]
    choosing: Held
    validation: Held
    flops_per_second: float
    points: dict[str, Point]


class Experiment:
    """The points and their state in an output folder."""

    def __init__(self, corpus: list[str], output: Path, scale: float, most_steps: int | None, processes: int) -> None:
        """Read the table of points.

        Args:
            corpus: Parquet files and globs; not needed once it is prepared.
            output: The folder of everything.
            scale: Of sets and runs; below 1 there is one seed and one learning rate.
            most_steps: Of a run; None for no limit.
            processes: Ranks of a run.
        """
        self.output, self.scale, self.most_steps, self.processes = output, scale, most_steps, processes
        self.table = validate(Table, read_yaml(CONFIGS / "points.yaml"), CONFIGS / "points.yaml")
        sets = {name: None if size is None else self._scaled(size) for name, size in self.table.sets.items()}
        held = {
            CHOOSING: self._scaled(self.table.choosing.concepts),
            VALIDATION: self._scaled(self.table.validation.concepts),
        }
        self.data = Corpus(corpus, output, sets, held, self.table.choosing.share)

    def _scaled(self, concepts: int) -> int:
        return concepts if self.scale == 1 else max(LEAST_CONCEPTS, round(concepts * self.scale))

    # --- one point ----------------------------------------------------------------------------------------------------

    def state(self, name: str) -> dict[str, Any] | None:
        """What is known of a point that is done; None if it is not."""
        return read_object(self._file(name), default={}) or None

    def _file(self, name: str) -> Path:
        return self.output / "points" / f"{name}.json"

    def run(self, name: str) -> None:
        """Do what is left of a point: choose the learning rate, train, evaluate."""
        point, started = self.table.points[name], time.monotonic()
        if self.state(name) is not None:
            return
        print(f"{name}: begins", flush=True)
        self.data.make(point.variant, point.set)
        rate, tried = self._learning_rate(name, point)
        runs = []
        for seed in range(1, self._seeds(point) + 1):
            # A run that chose is the point's own if it was as long.
            run = self._train(name, point, rate, seed)
            evaluation = self._evaluate(name, run, point, EVERY if seed == 1 else FEW)
            runs.append({"seed": seed, "run": str(run), "evaluation": evaluation})
        others = self._compare(name, point, runs[0]["run"])
        seconds = round(time.monotonic() - started)
        done = {"learning_rate": rate, "tried": tried, "runs": runs, "compared": others, "seconds": seconds}
        self._file(name).parent.mkdir(exist_ok=True)
        write_whole(self._file(name), json.dumps(done, indent=1) + "\n")
        print(f"{name}: done in {seconds:,} s", flush=True)

    def _seeds(self, point: Point) -> int:
        return point.seeds if self.scale == 1 else 1

    def _learning_rate(self, name: str, point: Point) -> tuple[float, dict[str, float]]:
        """The learning rate with the lowest loss on the choosing books, and these losses."""
        if not point.learning_rates:
            before = self.state(point.like or "")
            if before is None:
                raise InputError(f"{name}: takes its learning rate from {point.like}: add that to --only")
            return float(before["learning_rate"]), {}
        rates = point.learning_rates if self.scale == 1 else point.learning_rates[:1]
        tried = {}
        for rate in rates:
            run = self._train(name, point, rate, 1, point.choosing_share)
            tried[f"{rate:g}"] = _last_validation(run)
        return min(rates, key=lambda rate: tried[f"{rate:g}"]), tried

    def _train(self, name: str, point: Point, rate: float, seed: int, share: float = 1.0) -> Path:
        """A run of a point, unless it is complete.

        Args:
            name: Of the point.
            point: The point.
            rate: Its learning rate.
            seed: Of weights, data order and noise.
            share: Of the point's length.

        Returns:
            Its folder.
        """
        kind = "" if share == 1 else f"-{share:g}"
        folder = self.output / "runs" / name / f"lr-{rate:g}-seed-{seed}{kind}"
        overrides = self.overrides(point, rate, seed, share, folder)
        config = load(TrainConfig, CONFIGS / "train.yaml", overrides)
        with contextlib.suppress(InputError):
            if find(folder).step == config.steps:
                return folder
        code = _train_here(overrides) if self.processes == 1 else _launch(self.processes, overrides)
        if code == STOPPED:
            raise KeyboardInterrupt
        if code:
            raise InputError(f"{folder}: the run has ended with exit code {code}: see its log.txt")
        return folder

    def overrides(self, point: Point, rate: float, seed: int, share: float, folder: Path) -> list[str]:
        """The changes of train.yaml that make a run.

        Args:
            point: Of the run.
            rate: Its learning rate.
            seed: Of weights, data order and noise.
            share: Of the point's length.
            folder: Its output.
        """
        steps = self.steps(point, share)
        places = {"train": self.data.folder(point.variant, point.set)}
        places |= {"validation": self.data.folder(point.variant, CHOOSING)}
        return [
            *(f"data.{key}={place}" for key, place in places.items()),
            *point.changes,
            f"run_dir={folder}",
            f"batch.micro_batch_rows={load(TrainConfig, CONFIGS / 'train.yaml').batch.rows_per_step // self.processes}",
            f"seed={seed}",
            f"optim.lr={rate}",
            f"steps={steps}",
            f"optim.schedule.warmup_steps={max(1, steps // 20)}",
            f"evaluate.every={max(50, -(-steps // 4))}",
            f"checkpoint.every={max(50, -(-steps // 4))}",
        ]

    def steps(self, point: Point, share: float = 1.0) -> int:
        """The steps of a run of a point."""
        config = load(TrainConfig, CONFIGS / "train.yaml")
        steps = max(LEAST_STEPS, round(point.concepts * self.scale * share / _step_concepts(config)))
        return steps if self.most_steps is None else min(steps, self.most_steps)

    def _evaluate(self, name: str, run: Path, point: Point, baseline_concepts: int) -> str:
        """Evaluate a run on the validation books, unless that is done; returns the file in OUTPUT/evaluations.

        Args:
            name: Of the point.
            run: The run.
            point: The point.
            baseline_concepts: To fit baselines to.
        """
        variant = "float32" if point.part == "storage" else point.variant
        self.data.make(variant, VALIDATION)
        path = self.output / "evaluations" / f"{name}-{run.name}.json"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            started = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                dataset = str(self.data.folder(variant, VALIDATION))
                evaluate(run, dataset, str(path), samples=1, baseline_concepts=baseline_concepts)
            write_whole(path.with_suffix(".txt"), printed.getvalue())
            print(f"{name}: {run.name}: evaluated in {time.monotonic() - started:.0f} s", flush=True)
        return str(path)

    def _compare(self, name: str, point: Point, run: str) -> str | None:
        """The comparison with the point that this one changes, on the same targets; None if texts are cut differently.

        Args:
            name: Of the point.
            point: The point.
            run: Its run.
        """
        like = "storage-float32" if point.part == "storage" else point.like
        if like in (None, name) or point.variant == "characters-500":
            return None
        before = self.state(like)
        if before is None:
            raise InputError(f"{name}: is compared with {like}: add that to --only")
        variant = "float32" if point.part == "storage" else "main"
        path = self.output / "evaluations" / f"{name}-compared.json"
        with contextlib.redirect_stdout(io.StringIO()):
            runs = [before["runs"][0]["run"], run]
            compare(runs, str(self.data.folder(variant, VALIDATION)), str(path), baselines=False)
        return str(path)

    def parameters(self, point: Point) -> int:
        """Of a point's model."""
        return count_parameters(resolve_sizes(load(TrainConfig, CONFIGS / "train.yaml", point.changes).model))

    # --- the plan -----------------------------------------------------------------------------------------------------

    def plan(self) -> Iterator[str]:
        """A line for each point: its state, its size, and about how long it takes."""
        per_second = self._flops_per_second()
        yield f"{'point':21}{'state':9}{'parameters':>12}{'sentences':>11}{'runs':>6}{'concepts':>12}{'hours':>7}"
        left = 0.0
        for name, point in self.table.points.items():
            config = load(TrainConfig, CONFIGS / "train.yaml", point.changes)
            sizes = resolve_sizes(config.model)
            lengths = self.lengths(point)
            concepts = [self.steps(point, share) * _step_concepts(config) for share in lengths]
            flops = sum(training_flops(sizes, each, each * config.data.max_segment // 2) for each in concepts)
            seconds = flops / per_second + len(concepts) * START_SECONDS + self._seeds(point) * EVALUATION_SECONDS
            state = self._word(name)
            left += 0.0 if state == "done" else seconds
            size = self.table.sets[point.set]
            sentences = "all" if size is None else f"{self._scaled(size):,}"
            yield (
                f"{name:21}{state:9}{count_parameters(sizes):12,}{sentences:>11}{len(concepts):6}{sum(concepts):12,}"
                f"{seconds / 3600:7.2f}"
            )
        yield f"{left / 3600:.1f} hours are left, at {per_second:.1e} FLOPs a second; encoding is not counted"

    def lengths(self, point: Point) -> list[float]:
        """The runs of a point, as shares of its length."""
        rates = len(point.learning_rates) if self.scale == 1 else min(1, len(point.learning_rates))
        if point.choosing_share == 1:
            return [1.0] * (max(1, rates) + self._seeds(point) - 1)
        return [point.choosing_share] * rates + [1.0] * self._seeds(point)

    def _word(self, name: str) -> str:
        """done, begun or open."""
        if self.state(name) is not None:
            return "done"
        return "begun" if (self.output / "runs" / name).exists() else "open"

    def _flops_per_second(self) -> float:
        """Of the runs that are done, or else as in the table."""
        flops = seconds = 0.0
        for path in (self.output / "evaluations").glob("*-compared.json"):
            for run in read_object(path)["runs"]:
                flops, seconds = flops + run["flops"], seconds + run["seconds"]
        return flops / seconds if seconds else self.table.flops_per_second


def _launch(processes: int, overrides: Sequence[str]) -> int:
    """A run of several ranks, which Ctrl-C stops with a checkpoint; returns its exit code."""
    command = [sys.executable, "-m", "lcm_ds.cli", "launch", "--local", str(processes), str(CONFIGS / "train.yaml")]
    with subprocess.Popen([*command, *overrides], stdout=subprocess.DEVNULL) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # the launcher has got it, too
                return process.wait()


def _train_here(overrides: Sequence[str]) -> int:
    """A run of one rank, forked from a process that has imported everything; returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lcm_ds.train.job_builder", "lcm_ds.train.loop"])
    worker = context.Process(target=_worker, args=(list(overrides),))
    worker.start()
    worker.join()
    return int(worker.exitcode or 0)


def _worker(overrides: list[str]) -> None:
    from lcm_ds.train import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # RUN/log.txt has it
    sys.exit(main(str(CONFIGS / "train.yaml"), overrides))


def _step_concepts(config: TrainConfig) -> int:
    return config.batch.rows_per_step * config.data.row_length


def _last_validation(run: Path) -> float:
    """The loss on the choosing books at the end of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float([line["val_loss"] for line in lines if line.get("val_loss") is not None][-1])


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment, or what --only names; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", default=[], metavar="GLOB", help="parquet: text, id, file_path")
    parser.add_argument("--encoded", metavar="FOLDER", help="the prepared corpus; default: OUTPUT/encoded")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="of everything that is made")
    parser.add_argument("--only", nargs="+", metavar="POINT|PART", help="these points; parts: data size paper storage")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="sizes of sets and runs; default: 1")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of a run, at most: to try everything out")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="ranks of a run; default: 1")
    parser.add_argument("--list", action="store_true", help="print the points with their state and exit")
    parser.add_argument("--report", action="store_true", help="print docs/results.md of the points that are done")
    options = parser.parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        experiment = Experiment(options.corpus, options.output, options.scale, options.steps, options.processes)
        if options.encoded is not None:
            experiment.data.encoded = Path(options.encoded)
        if options.report:
            from books_report import page

            print(page(experiment))
            return 0
        points = experiment.table.points
        chosen = [name for name, point in points.items() if not options.only or {name, point.part} & set(options.only)]
        if unknown := set(options.only or ()) - set(points) - {point.part for point in points.values()}:
            raise InputError(f"--only {name}: no such point; --list prints them" for name in sorted(unknown))
        if not options.list:
            experiment.data.prepare()
            for name in chosen:
                experiment.run(name)
        for line in experiment.plan():
            print(line)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped on request: call it again to resume", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
