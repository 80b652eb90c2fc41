"""An evaluation for people: tables on the terminal, and the error by position as a picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lcm_ds.evaluate.accumulator import best
from lcm_ds.evaluate.compute import MODEL, NORMALISED, RAW, TRUTH

WIDTH = 110  # of a table where there is no terminal


class Column(NamedTuple):
    """A figure in a table."""

    title: str
    space: str
    metric: str
    form: str
    better: Callable[[float], float] | None = None  # what is lowest where the figure is best; None: nothing is better

    @property
    def label(self) -> str:
        """The title without its arrow."""
        return self.title.rstrip(" ↓↑")


def _high(value: float) -> float:
    return -value


def _low(value: float) -> float:
    return value


def _near_one(value: float) -> float:
    return abs(value - 1)


NEARNESS = (
    Column("MSE ↓", NORMALISED, "mse", "{:.4f}", _low),
    Column("MSE raw ↓", RAW, "mse", "{:.3g}", _low),
    Column("ℓ2 ↓", RAW, "l2", "{:.4f}", _low),
    Column("ℓ2-r ↓", RAW, "l2_round_trip", "{:.4f}", _low),
    Column("cosine ↑", RAW, "cosine", "{:.4f}", _high),
    Column("CA % ↑", RAW, "ca", "{:.2%}", _high),
)
RETRIEVAL = (
    Column("R@1 % ↑", RAW, "recall_at_1", "{:.2%}", _high),
    Column("R@10 % ↑", RAW, "recall_at_10", "{:.2%}", _high),
    Column("MRR ↑", RAW, "mrr", "{:.4f}", _high),
    Column("PAR", RAW, "par", "{:.3f}"),
    Column("MI ↑", RAW, "mi", "{:.3f}", _high),
    Column("variance", NORMALISED, "variance_ratio", "{:.3f}"),
    Column("eff. rank", NORMALISED, "effective_rank", "{:.1f}"),
)


def print_tables(title: str, found: dict[str, Any]) -> None:
    """The figures as tables that anyone can read, the best of each column marked; intervals, and what is missing."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else WIDTH, soft_wrap=False)
    scores = {**found["scores"], TRUTH: found["truth"]["scores"]}
    heading = (
        f"{title}: next-concept prediction on {found['dataset']}\n"
        f"{found['documents']:,} documents, {found['targets']:,} targets; * best of its column"
    )
    for columns in (NEARNESS, RETRIEVAL):
        table = Table(title=heading if columns is NEARNESS else None)
        table.add_column("predictor")
        for column in columns:
            table.add_column(column.title, justify="right")
        for name, cells in _cells(scores, columns):
            table.add_row(name, *cells, style="bold" if name == MODEL else None)
        console.print(table)
    for line in _lines(found):
        console.print(line, highlight=False, markup=False)


def _cells(scores: dict[str, Any], columns: Iterable[Column]) -> Iterable[tuple[str, list[str]]]:
    """The rows of a table. The truth has a row where there is something of it, and wins nothing."""
    winners = {
        column: None
        if column.better is None
        else best({name: _better(by, column) for name, by in scores.items() if name != TRUTH})
        for column in columns
    }
    for name, by in scores.items():
        values = [by[column.space].get(column.metric) for column in columns]
        if name == TRUTH and all(value is None for value in values):
            continue
        yield (
            name,
            [
                "–  " if value is None else _told(column, value) + (" *" if winners[column] == name else "  ")
                for column, value in zip(columns, values, strict=True)
            ],
        )


def _better(by: dict[str, Any], column: Column) -> float | None:
    value = by[column.space].get(column.metric)
    return None if value is None or column.better is None else column.better(value)


def _told(column: Column, value: float) -> str:
    return column.form.format(value).replace("%", "")


def _lines(found: dict[str, Any]) -> Iterable[str]:
    """Intervals of the model, how far it is from the best baseline, and notes."""
    parts = []
    for column in (*NEARNESS, *RETRIEVAL):
        ends = found["intervals"][MODEL][column.space].get(column.metric)
        if ends is not None:
            parts.append(f"{column.label} {_told(column, ends[0])}–{_told(column, ends[1])}")
    if parts:
        yield f"95 % intervals of {MODEL}: " + ", ".join(parts)
    difference = found["difference"]
    if difference is not None:
        ends = difference["interval"]
        told = "" if ends is None else f" (95 %: {ends[0]:+.4f} to {ends[1]:+.4f})"
        yield f"{difference['of']} less {difference['less']}: MSE {difference['value']:+.4f}{told}"
        yield from _why(found["baselines"])
    retrieval = found["retrieval"]
    yield (
        "MSE, variance and rank in normalised space, where MSE is the training loss; the others in the encoder's own. "
        f"R@k, MRR: {retrieval['targets']:,} targets among {retrieval['candidates']:,} concepts."
    )
    yield from (f"– {note}" for note in found["notes"])


def _why(baselines: dict[str, Any]) -> Iterable[str]:
    """How the best baseline was found; nothing if there is only one."""
    error = baselines["held_out_mse"].get(baselines["best"])
    if error is not None:
        by = f"{baselines['held_out']:,} targets of held-out training documents"
        where = by if baselines["held_out"] else "the training data itself, too small to hold documents out"
        yield f"{baselines['best']} is the best baseline on {where}: MSE {error:.4f}"


def draw_figure(title: str, found: dict[str, Any]) -> bytes:
    """The error by position in the document, of the model and its baselines with their intervals: a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_position = found["by_position"]
    shown = [number for number, count in enumerate(by_position["targets"]) if count]
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("mse", "MSE, normalised space"), ("cosine", "cosine, raw space"))
    for axes, (metric, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, by in by_position["predictors"].items():
            values = [by[metric][number] for number in shown]
            ends = [
                by[f"{metric}_intervals"][number] or (value, value) for number, value in zip(shown, values, strict=True)
            ]
            width = 2.5 if name == MODEL else 1.2
            (line,) = axes.plot(range(len(shown)), values, marker="o", markersize=3, linewidth=width, label=name)
            axes.fill_between(
                range(len(shown)), *zip(*ends, strict=True), alpha=0.15, color=line.get_color(), linewidth=0
            )
        axes.set_xticks(range(len(shown)), [_bucket(by_position["positions"][number]) for number in shown])
        axes.set(xlabel="concepts before the target in its document", ylabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(f"{title} (bands: 95 %, bootstrap over documents)", fontsize="medium")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _bucket(ends: list[int | None]) -> str:
    first, last = ends
    if last is None:
        return f"{first}+"
    return str(first) if first == last else f"{first}–{last}"
