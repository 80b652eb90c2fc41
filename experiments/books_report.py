"""docs/results.md of the experiment on books, and its figures, from the points that are done."""

from __future__ import annotations

import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from books_data import CHOOSING, CONFIG, VALIDATION

from lcm_ds.config import TrainConfig, load
from lcm_ds.devices import gpu_named
from lcm_ds.evaluate.compare import concepts_and_seconds
from lcm_ds.files import read_object
from lcm_ds.model.flops import training_flops
from lcm_ds.model.sizes import resolve_sizes

if TYPE_CHECKING:
    from books import Experiment

MODEL = "Base-LCM"
DRAWS = 2000  # of a power law's uncertainty
EXPONENTS = np.linspace(0.02, 2.0, 199)
GPU, GPU_MFU = gpu_named("h100"), 0.4
LIBRARIES = ("torch", "deepspeed", "numpy", "sentence-transformers")


class Curve:
    """Losses against a size, each with its interval."""

    def __init__(self, sizes: list[float], losses: list[float], intervals: list[list[float]]) -> None:
        order = np.argsort(sizes)
        self.sizes, self.losses = np.array(sizes, float)[order], np.array(losses, float)[order]
        self.intervals = np.array(intervals, float)[order]

    def power_law(self) -> dict[str, list[float]] | None:
        """`floor` + `factor` · size^−`exponent`: estimate, low and high (95 %) of each; None for fewer than 4 points.

        Least squares; the uncertainty is that of losses drawn from their intervals, independently of one another.
        """
        if len(self.sizes) < 4:
            return None
        spread = np.nan_to_num(self.intervals[:, 1] - self.intervals[:, 0]) / (2 * 1.96)
        random = np.random.default_rng(0)
        draws = [_fit(self.sizes, self.losses + random.normal(size=len(spread)) * spread) for _ in range(DRAWS)]
        estimate = _fit(self.sizes, self.losses)
        low, high = np.percentile(draws, [2.5, 97.5], axis=0)
        names = ("floor", "factor", "exponent")
        return {
            name: [*map(float, each)] for name, each in zip(names, zip(estimate, low, high, strict=True), strict=True)
        }


def _fit(sizes: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """The least-squares floor, factor and exponent; the factor is not negative."""
    best = (np.inf, (float(losses.mean()), 0.0, 0.0))
    for exponent in EXPONENTS:
        falling = (sizes / sizes[0]) ** -exponent
        inputs = np.stack([np.ones_like(falling), falling], axis=1)
        (floor, factor), *_ = np.linalg.lstsq(inputs, losses, rcond=None)
        error = float(np.square(inputs @ np.array([floor, factor]) - losses).sum())
        if factor >= 0 and error < best[0]:
            best = error, (float(floor), float(factor * sizes[0] ** exponent), float(exponent))
    return best[1]


def page(experiment: Experiment) -> str:
    """The page; figures are written to OUTPUT/figures."""
    done = {name: state for name in experiment.table.points if (state := experiment.state(name)) is not None}
    parts = [
        _head(experiment),
        _summary(experiment, done),
        _data(experiment),
        _curves(experiment, done),
        _positions(done),
        _paper(experiment, done),
    ]
    return "\n".join([*parts, _storage(experiment, done), _cost(experiment, done), _tried(experiment, done)])


def _head(experiment: Experiment) -> str:
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)]
    ranks = "one rank" if experiment.processes == 1 else f"{experiment.processes} ranks"
    scale = "" if experiment.scale == 1 else f" At a scale of {experiment.scale:g}: these are no results."
    return f"""# Results

What a Base-LCM learns from up to 1.2 million sentences of 346 public-domain books, encoded with all-MiniLM-L6-v2 (384
dimensions), beside the best of simpler predictors, by data and by size. This page is the output of
experiments/books.py.{scale}

{date.today()}, {platform.machine()} with {len(os.sched_getaffinity(0))} CPU cores, {ranks} a run,
{", ".join(versions)}.

```bash
# needs the corpus, and hours of two cores: `--list` prints how many
python experiments/books.py --corpus 'BOOKS/*.parquet' --output experiment
python experiments/books.py --output experiment --report > docs/results.md
cp experiment/figures/*.png docs/images
```
"""


def _summary(experiment: Experiment, done: dict[str, Any]) -> str:
    """A line for each point of the curves: ahead of the best baseline, behind it, or neither."""
    lines = []
    for name in [each for each in done if each.startswith(("data-", "size-"))]:
        found = read_object(Path(done[name]["runs"][0]["evaluation"]))
        own, difference = found["scores"][MODEL]["normalised"], found["difference"]
        low, high = difference["interval"] or (-np.inf, np.inf)
        word = "ahead of" if high < 0 else "behind" if low > 0 else "not to be told from"
        point = experiment.table.points[name]
        concepts = experiment.data.facts()["sets"][point.set]["concepts"]
        lines.append(
            f"- {experiment.parameters(point) / 1e6:.0f} M parameters, {concepts:,} training concepts: {word} the best "
            f"baseline, MSE {own['mse']:.4f}, {difference['value']:+.4f} ({_ends(difference['interval'], '+.4f')}); "
            f"the predictions vary {own['variance_ratio']:.1%} as much as the targets"
        )
    return "## In short\n\n" + "\n".join(lines) + "\n" if lines else ""


def _data(experiment: Experiment) -> str:
    facts = experiment.data.facts()
    rows = [
        f"| {name} | {each['books']:,} | {each['documents']:,} | {each['concepts']:,} |"
        for name, each in facts["sets"].items()
    ]
    held = f"{CHOOSING}: training books that no model is trained on; {VALIDATION}: chapters of the validation books"
    return f"""## Data

The corpus is parquet in FineWeb-Edu's schema: a chapter a row (`text`, `id`), and `file_path`, which names author and
book. Any collection with these columns will do. spaCy's rules split sentences, of 250 characters at most. A hash of
`file_path` (`source.group_column`) decides the split: chapters of one book are on one side.
{_percent(facts["shared_sentences"])} of the validation sentences of 40 characters or more are also in the training
data, word for word (quotations, prefaces, books in two editions).

| set | books | chapters | concepts |
| --- | ---: | ---: | ---: |
{chr(10).join(rows)}

{held}. Each training set is the beginning of the next. All have one normaliser, so that errors can be compared.
"""


def _percent(share: float) -> str:
    return f"{share:.2%}".replace("%", " %")


def _row(experiment: Experiment, name: str, state: dict[str, Any]) -> str:
    """A point as a row of a table of results."""
    found = read_object(Path(state["runs"][0]["evaluation"]))
    scores, intervals = found["scores"], found["intervals"][MODEL]
    own, best = scores[MODEL], found["baselines"]["best"]
    difference = found["difference"]
    seeds = [read_object(Path(run["evaluation"]))["scores"][MODEL]["normalised"]["mse"] for run in state["runs"]]
    spread = f" ({min(seeds):.4f} to {max(seeds):.4f})" if len(seeds) > 1 else ""
    cells = [
        name,
        f"{state['learning_rate']:g}",
        f"{own['normalised']['mse']:.4f}{spread}",
        _ends(intervals["normalised"].get("mse")),
        f"{scores[best]['normalised']['mse']:.4f} ({best.replace('ridge from ', '')})",
        f"{difference['value']:+.4f}",
        _ends(difference["interval"], "+.4f"),
        f"{own['raw']['ca']:.1%}".replace("%", ""),
        f"{own['raw']['recall_at_10']:.1%}".replace("%", ""),
        f"{own['normalised']['variance_ratio']:.3f}",
        "–" if own["normalised"]["effective_rank"] is None else f"{own['normalised']['effective_rank']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = ("lr", "MSE (seeds)", "95 %", "best baseline", "model less baseline", "95 % by book", "CA %", "R@10 %",
           "variance", "eff. rank")  # fmt: skip
TABLE = f"| point | {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * len(COLUMNS)}"


def _ends(ends: list[float] | None, form: str = ".4f") -> str:
    return "–" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def _curves(experiment: Experiment, done: dict[str, Any]) -> str:
    text = "## Data and size\n\nAll on the same targets of the validation books; intervals are drawn from books.\n"
    for part, title, axis in (("data", "More data", "training concepts"), ("size", "Larger models", "parameters")):
        names = [name for name in done if experiment.table.points[name].part == part]
        if part == "size" and "data-1200k" in done:
            names.insert(1, "data-1200k")
        if not names:
            continue
        rows = "\n".join(_row(experiment, name, done[name]) for name in names)
        text += f"\n### {title}\n\n{TABLE}\n{rows}\n"
        sizes = [_size(experiment, name, axis) for name in names]
        found = [read_object(Path(done[name]["runs"][0]["evaluation"])) for name in names]
        curve = Curve(
            sizes,
            [each["scores"][MODEL]["normalised"]["mse"] for each in found],
            [each["intervals"][MODEL]["normalised"].get("mse") or [np.nan, np.nan] for each in found],
        )
        law = curve.power_law()
        figure = experiment.output / "figures" / f"books_{part}.png"
        _draw_curve(figure, axis, sizes, found, law)
        text += f"\n![MSE by {axis}: Base-LCM and the best baseline](images/{figure.name})\n"
        if law is None:
            text += f"\n{len(names)} points do not give a power law, which has three parameters.\n"
        else:
            exponent, floor = law["exponent"], law["floor"]
            text += (
                f"\nA power law, floor + factor · size^−exponent: exponent {exponent[0]:.2f} ({exponent[1]:.2f} to "
                f"{exponent[2]:.2f}), floor {floor[0]:.4f} ({floor[1]:.4f} to {floor[2]:.4f}), by {DRAWS:,} draws of "
                "each loss from its own interval.\n"
            )
    return text


def _positions(done: dict[str, Any]) -> str:
    """The error by position in the document, of each point of the curves and of its best baseline."""
    lines, positions = [], []
    for name in [each for each in done if each.startswith(("data-", "size-"))]:
        found = read_object(Path(done[name]["runs"][0]["evaluation"]))
        positions, errors = found["by_position"]["positions"], found["by_position"]["predictors"]
        for predictor in (MODEL, found["baselines"]["best"]):
            cells = ["–" if value is None else f"{value:.4f}" for value in errors[predictor]["mse"]]
            lines.append(f"| {name}, {predictor} | {' | '.join(cells)} |")
    if not lines:
        return ""
    bands = [f"{first}" if first == last else f"{first}–{last or ''}" for first, last in positions]
    return f"""
### By position

MSE of the targets at these positions of their chapter. A model sees the segment of 128 concepts, not the chapter.

| | {" | ".join(bands)} |
| --- |{" ---: |" * len(bands)}
{chr(10).join(lines)}
"""


def _size(experiment: Experiment, name: str, axis: str) -> float:
    point = experiment.table.points[name]
    if axis == "training concepts":
        return float(experiment.data.facts()["sets"][point.set]["concepts"])
    return float(experiment.parameters(point))


def _draw_curve(
    path: Path, axis: str, sizes: list[float], found: list[dict[str, Any]], law: dict[str, list[float]] | None
) -> None:
    """Plot the losses of model and best baseline against a size.

    Args:
        path: The PNG.
        axis: The size.
        sizes: Of each point.
        found: The evaluation of each.
        law: To draw, if there is one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    baselines = [each["baselines"]["best"] for each in found]
    for label, names in ((MODEL, [MODEL] * len(found)), ("best baseline", baselines)):
        values = [each["scores"][name]["normalised"]["mse"] for each, name in zip(found, names, strict=True)]
        ends = [each["intervals"][name]["normalised"].get("mse") for each, name in zip(found, names, strict=True)]
        bars = [[v - e[0], e[1] - v] if e else [0, 0] for v, e in zip(values, ends, strict=True)]
        axes.errorbar(sizes, values, yerr=np.abs(np.array(bars).T), marker="o", capsize=3, label=label)
    if law is not None:
        grid = np.geomspace(min(sizes), max(sizes), 100)
        floor, factor, exponent = (law[name][0] for name in ("floor", "factor", "exponent"))
        axes.plot(grid, floor + factor * grid**-exponent, "--", color="grey", label="power law")
    axes.set(xscale="log", xlabel=axis, ylabel="MSE, normalised space")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


QUESTIONS = {
    "noise-0": "no noise on the inputs",
    "noise-0.5": "noise of 0.5",
    "attention-row": "attention over the row instead of the document",
    "segment-16": "segments of 16 concepts instead of 128",
    "normaliser-standard": "mean and standard deviation instead of median and IQR",
    "characters-500": "sentences cut at 500 characters instead of 250",
}


def _paper(experiment: Experiment, done: dict[str, Any]) -> str:
    names = [name for name in done if experiment.table.points[name].part == "paper"]
    if not names:
        return ""
    text = """## What the paper says, checked

Each line changes one thing of data-200k (noise 0.05, attention within the document), at its learning rate. A difference
below 0 means that the change helps.

| change | MSE of the run | MSE less data-200k (95 %) | model less best baseline (95 %) | variance ratio |
| --- | ---: | ---: | ---: | ---: |
"""
    for name in names:
        found = read_object(Path(done[name]["runs"][0]["evaluation"]))
        own, difference = found["scores"][MODEL]["normalised"], found["difference"]
        against = "other targets"
        if done[name]["compared"] is not None:
            compared = read_object(Path(done[name]["compared"]))
            key, form = ("mse", "+.4f") if compared["one_normaliser"] else ("mse_raw", "+.1e")
            less = compared["runs"][1]["less_first"][key]
            against = f"{less['value']:{form}} ({_ends(less['interval'], form)})"
            against += "" if compared["one_normaliser"] else ", raw space"
        text += (
            f"| {QUESTIONS[name]} | {own['mse']:.4f} | {against} | {difference['value']:+.4f} "
            f"({_ends(difference['interval'], '+.4f')}) | {own['variance_ratio']:.3f} |\n"
        )
    return text


def _storage(experiment: Experiment, done: dict[str, Any]) -> str:
    names = [name for name in done if experiment.table.points[name].part == "storage"]
    if not names:
        return ""
    text = """## What storing loses

Trained on concepts that were encoded or stored with fewer bits, validated on those in float32 (50 k sentences).

| training data | MSE | less float32 (95 %) |
| --- | ---: | ---: |
"""
    for name in names:
        own = read_object(Path(done[name]["runs"][0]["evaluation"]))["scores"][MODEL]["normalised"]["mse"]
        against = "–"
        if done[name]["compared"] is not None:
            less = read_object(Path(done[name]["compared"]))["runs"][1]["less_first"]["mse"]
            against = f"{less['value']:+.5f} ({_ends(less['interval'], '+.5f')})"
        text += f"| {name.removeprefix('storage-')} | {own:.5f} | {against} |\n"
    return text


def _cost(experiment: Experiment, done: dict[str, Any]) -> str:
    """What encoding, training and evaluating took here, and what training would take on a GPU by its FLOPs."""
    rows = []
    for name, state in done.items():
        found = read_object(Path(state["runs"][0]["evaluation"]))
        concepts, seconds = concepts_and_seconds(Path(state["runs"][0]["run"]), found["step"])
        config = load(TrainConfig, CONFIG.with_name("train.yaml"), experiment.table.points[name].changes)
        flops = training_flops(resolve_sizes(config.model), 10**6, 10**6 * config.data.max_segment // 2)
        rows.append(
            f"| {name} | {concepts:,} | {seconds:,.0f} | {seconds / concepts * 1e6:,.0f} | "
            f"{flops / (GPU_MFU * GPU.tflops * 1e12):.2f} | {found['seconds'] / found['targets'] * 1e6:,.0f} |"
        )
    encoded = "".join(
        f"Encoding {each['sentences']:,} sentences in {each['dtype']} took {each['seconds']:,.0f} s, start included: "
        f"{each['seconds'] / each['sentences'] * 1e6:,.0f} s a million.\n"
        for each in experiment.data.encodings().values()
    )
    return f"""## Cost

{encoded}
Seconds of this machine, other work included; of evaluation, all baselines included. {GPU.part} is arithmetic: the
model's FLOPs at {GPU_MFU:.0%} of the card's peak, which so small a model will not reach.

| point | concepts of a run | s | s a million, training | {GPU.part}, s a million | s a million targets, evaluation |
| --- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}
"""


def _tried(experiment: Experiment, done: dict[str, Any]) -> str:
    lines = [
        f"- {name}: " + ", ".join(f"{rate}: {loss:.4f}" for rate, loss in state["tried"].items())
        for name, state in done.items()
        if state["tried"]
    ]
    return f"""## What was tried

Learning rates, each with its loss on the choosing books:

{chr(10).join(lines)}
"""


if __name__ == "__main__":
    sys.exit("run experiments/books.py --report")
