"""An evaluation as tables on the terminal, and the error by position as a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

from lcm_ds.evaluate.accumulator import best
from lcm_ds.evaluate.compute import MODEL, TRUTH
from lcm_ds.metrics import EVALUATION, HIGHER, NORMALISED, RAW, Metric
from lcm_ds.terminal import rich_console

WIDTH = 110  # of a table that is not printed to a terminal


def print_tables(title: str, result: dict[str, Any]) -> None:
    """Print the metrics that have a value as tables with the best of each column marked; then intervals and notes."""
    from rich.table import Table

    console = rich_console(width=None if rich_console().is_terminal else WIDTH)
    scores = {**result["scores"], TRUTH: result["truth"]["scores"]}
    heading = (
        f"{title}: next-concept prediction on {result['dataset']}\n"
        f"{result['documents']:,} documents{_in_groups(result)}, {result['targets']:,} targets; * best of its column"
    )
    shown = [metric for metric in EVALUATION if any(_value(by, metric) is not None for by in scores.values())]
    half = -(-len(shown) // 2)
    for metrics in (shown[:half], shown[half:]):
        table = Table(title=heading if metrics[0] is shown[0] else None)
        table.add_column("predictor")
        for metric in metrics:
            table.add_column(f"{metric.label} {metric.better}".strip(), justify="right")
        for name, cells in _cells(scores, metrics):
            table.add_row(name, *cells, style="bold" if name == MODEL else None)
        console.print(table)
    if by_language := result.get("by_language"):
        console.print(_language_table(Table(title="by language"), by_language))
    for line in _lines(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _in_groups(result: dict[str, Any]) -> str:
    """Which units the bootstrap resamples, unless they are documents."""
    return f" in {result['groups']:,} groups" if "groups" in result else ""


def _language_table(table: Any, by_language: dict[str, Any]) -> Any:
    """MSE and cosine of the model, and the lowest MSE of a baseline, in each language."""
    for heading in ("language", "targets", f"{MODEL} MSE ↓", "cosine ↑", "best baseline's MSE ↓"):
        table.add_column(heading, justify="left" if heading == "language" else "right")
    for language, found in by_language.items():
        errors = {name: each["mse"] for name, each in found["predictors"].items() if name != MODEL}
        lowest, own = best(errors), found["predictors"][MODEL]
        cells = ["–" if value is None else f"{value:.4f}" for value in (own["mse"], own["cosine"])]
        table.add_row(
            language, f"{found['targets']:,}", *cells, "–" if lowest is None else f"{errors[lowest]:.4f} ({lowest})"
        )
    return table


def _cells(scores: dict[str, Any], metrics: Iterable[Metric]) -> Iterable[tuple[str, list[str]]]:
    """The rows of a table. The truth cannot win, and has a row only if it has a value."""
    winners = {
        metric: best({name: _loss(by, metric) for name, by in scores.items() if name != TRUTH}) for metric in metrics
    }
    for name, by in scores.items():
        values = {metric: _value(by, metric) for metric in metrics}
        if name == TRUTH and all(value is None for value in values.values()):
            continue
        yield (
            name,
            [
                "–  " if value is None else format_value(metric, value) + (" *" if winners[metric] == name else "  ")
                for metric, value in values.items()
            ],
        )


def _value(by: dict[str, Any], metric: Metric) -> float | None:
    value: float | None = by[metric.space].get(metric.key)
    return value


def _loss(by: dict[str, Any], metric: Metric) -> float | None:
    """A value that is lowest for the best predictor; None if no value is better than another."""
    value = _value(by, metric)
    return None if value is None or not metric.better else -value if metric.better == HIGHER else value


def format_value(metric: Metric, value: float) -> str:
    """A value as tables show it; its unit is in the label."""
    return metric.form.format(value).replace("%", "")


def _lines(result: dict[str, Any]) -> Iterable[str]:
    """The model's intervals, its distance to the best baseline, and notes."""
    parts = []
    for metric in EVALUATION:
        ends = result["intervals"][MODEL][metric.space].get(metric.key)
        if ends is not None:
            parts.append(f"{metric.label} {format_value(metric, ends[0])}–{format_value(metric, ends[1])}")
    if parts:
        yield f"95 % intervals of {MODEL}: " + ", ".join(parts)
    difference = result["difference"]
    if difference is not None:
        ends = difference["interval"]
        bounds = "" if ends is None else f" (95 %: {ends[0]:+.4f} to {ends[1]:+.4f})"
        verdict = _verdict(difference["value"], ends)
        yield f"{difference['of']} less {difference['less']}: MSE {difference['value']:+.4f}{bounds}: {verdict}"
        yield from _choice(result["baselines"])
    retrieval = result["retrieval"]
    yield (
        "MSE, variance and effective rank are in normalised space (MSE is the training loss), all others in raw space. "
        f"R@k, MRR: {retrieval['targets']:,} targets among {retrieval['candidates']:,} concepts."
    )
    yield from (f"– {note}" for note in result["notes"])


def _verdict(value: float, interval: list[float] | None) -> str:
    """What the difference of the model's error and the best baseline's says, in words."""
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return "the data cannot tell it and the best baseline apart"
    return f"{'worse' if value > 0 else 'better'} than the best baseline"


def _choice(baselines: dict[str, Any]) -> Iterable[str]:
    """How the best baseline was chosen; nothing if there is only one."""
    error = baselines["held_out_mse"].get(baselines["best"])
    if error is not None:
        held_out = f"{baselines['held_out']:,} targets of held-out training documents"
        data = held_out if baselines["held_out"] else "the training data itself, too small to hold documents out"
        yield f"{baselines['best']} is the best baseline on {data}: MSE {error:.4f}"


def draw_figure(title: str, result: dict[str, Any]) -> bytes:
    """Plot the error by position in the document, of all predictors with their intervals: a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_position = result["by_position"]
    shown = [bucket for bucket, count in enumerate(by_position["targets"]) if count]
    figure = Figure(figsize=(13, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("mse", f"MSE, {NORMALISED} space (lower is better)"),
        ("cosine", f"cosine, {RAW} space (higher is better)"),
    )
    predictors = by_position["predictors"]
    with_band = {MODEL, result["baselines"]["best"]}  # bands of all would hide each other
    for axes, (metric, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, by in predictors.items():
            values = [by[metric][bucket] for bucket in shown]
            intervals = [by[f"{metric}_intervals"][bucket] for bucket in shown]
            ends = [each or (math.nan, math.nan) for each in intervals]  # no interval of few documents: no band
            width = 2.5 if name == MODEL else 1.2
            (line,) = axes.plot(range(len(shown)), values, marker="o", markersize=3, linewidth=width, label=name)
            if name in with_band:
                axes.fill_between(
                    range(len(shown)), *zip(*ends, strict=True), alpha=0.2, color=line.get_color(), linewidth=0
                )
        if metric == "mse" and (limits := _limits(predictors, shown, with_band)) is not None:
            axes.set_ylim(*limits)
        names = [_bucket(*by_position["positions"][bucket]) for bucket in shown]
        axes.set_xticks(range(len(shown)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set(xlabel="concepts before the target in its document", ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    bands = any(any(predictors[name]["mse_intervals"]) for name in with_band)
    units = "groups of documents" if "groups" in result else "documents"
    notes = [f"bands of {MODEL} and the best baseline: 95 % by bootstrap over {units}, none for one"] if bands else []
    notes += [f"above the left plot: {', '.join(above)}"] if (above := _far_above(predictors, shown)) else []
    figure.suptitle("\n".join([title, *notes]), fontsize="medium")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _far_above(predictors: dict[str, Any], shown: list[int]) -> list[str]:
    """Baselines whose error is nowhere near the model's: with them in the plot the others would be one line."""
    highest = max(predictors[MODEL]["mse"][bucket] for bucket in shown)
    return [name for name, by in predictors.items() if min(by["mse"][bucket] for bucket in shown) > 1.2 * highest]


def _limits(predictors: dict[str, Any], shown: list[int], with_band: set[str]) -> tuple[float, float] | None:
    """The errors that the plot shows; None: all."""
    above = _far_above(predictors, shown)
    errors = [by["mse"][bucket] for name, by in predictors.items() if name not in above for bucket in shown]
    bands = [predictors[name]["mse_intervals"][bucket] for name in with_band for bucket in shown]
    ends = [end for band in bands if band for end in band]
    low, high = min(errors + ends), max(errors + ends)
    return (low - 0.05 * (high - low), high + 0.05 * (high - low)) if above and high > low else None


def _bucket(first: int, last: int | None) -> str:
    return f"{first}+" if last is None else str(first) if first == last else f"{first}–{last}"
