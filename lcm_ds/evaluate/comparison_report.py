"""A comparison of several models as a table on the terminal and as a figure."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import Any

from lcm_ds.metrics import HIGHER, LOWER
from lcm_ds.terminal import figure, rich_console

WIDTH = 150  # of a table that is not printed to a terminal


def print_table(result: dict[str, Any]) -> None:
    """Print a row for each model, the best value of each column marked, and what the figures mean."""
    from rich.table import Table

    console = rich_console(width=None if rich_console().is_terminal else WIDTH)
    metric = compared_metric(result)
    label = "MSE" if metric == "mse" else "MSE raw"
    groups = f" in {result['groups']:,} groups" if "groups" in result else ""
    table = Table(
        title=f"next-concept prediction on {result['dataset']}\n{result['documents']:,} documents{groups}, "
        f"{result['targets']:,} targets that all models have; * best of its column"
    )
    headings = [
        "parameters",
        "concepts",
        "seconds",
        "FLOPs",
        f"{label} {LOWER}",
        "less the first (95 %)",
        f"cosine {HIGHER}",
        f"baseline's {label}",
        "less baseline (95 %)",
    ]
    table.add_column("model")
    for heading in headings:
        table.add_column(heading, justify="right")
    runs = result["runs"]
    lowest = min(run["scores"][metric]["value"] for run in runs)
    highest = max(run["scores"]["cosine"]["value"] for run in runs)
    for name, run in zip(short_names([run["run"] for run in runs]), runs, strict=True):
        error, cosine = run["scores"][metric]["value"], run["scores"]["cosine"]["value"]
        baseline = run.get("baseline")
        table.add_row(
            name,
            f"{run['parameters']:,}",
            *("–" if run[key] is None else form(run[key]) for key, form in _COST),
            _number(metric, error) + (" *" if error == lowest else "  "),
            _difference(metric, run["less_first"].get(metric)),
            f"{cosine:.4f}" + (" *" if cosine == highest else "  "),
            "–" if baseline is None else _number(metric, baseline["scores"][metric]["value"]),
            "–" if baseline is None else _difference(metric, baseline["model_less_baseline"][metric]),
        )
    console.print(table)
    for line in _notes(result):
        console.print(line, highlight=False, markup=False)


_COST = (
    ("concepts", lambda value: f"{value:,}"),
    ("seconds", lambda value: f"{value:,.0f}"),
    ("flops", lambda value: f"{value:.2e}"),
)


def compared_metric(result: dict[str, Any]) -> str:
    """What models are compared by: the MSE in normalised space, in raw space if their normalisers differ."""
    return "mse" if result["one_normaliser"] else "mse_raw"


def short_names(names: list[str]) -> list[str]:
    """Paths without the folder that all have in common."""
    parents = {os.path.dirname(name) for name in names}
    return [os.path.basename(name) for name in names] if len(parents) == 1 else names


def _number(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric == "mse" else f"{value:.3g}"


def _difference(metric: str, difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "–"
    digits = "+.4f" if metric == "mse" else "+.1e"
    ends = difference["interval"]
    bounds = "" if ends is None else f" ({ends[0]:{digits}} to {ends[1]:{digits}})"
    return f"{difference['value']:{digits}}{bounds}"


def _notes(result: dict[str, Any]) -> Iterable[str]:
    """What the columns are, and in what the models differ."""
    if not result["one_normaliser"]:
        yield "– the models' normalisers differ, so that only errors in raw space can be compared"
    more = [run["targets"] for run in result["runs"] if run["targets"] > result["targets"]]
    if more:
        yield f"– models have up to {max(more):,} targets of their own: their rows are cut differently"
    yield (
        "seconds: of the training steps. FLOPs: of the model, forward and backward. Baseline: the best linear one on "
        "held-out training documents, fitted to the training data of the run."
    )


def draw_figure(result: dict[str, Any]) -> bytes:
    """Plot each model's error with its interval beside its baseline's, and errors against FLOPs: a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric, runs = compared_metric(result), result["runs"]
    names = short_names([run["run"] for run in runs])
    label = "MSE, normalised space" if metric == "mse" else "MSE, raw space"
    page = Figure(figsize=(13, max(3.5, 1.5 + 0.35 * len(runs))), dpi=120, layout="constrained")
    FigureCanvasAgg(page)
    left, right = page.subplots(1, 2)
    for row, run in enumerate(runs):
        value, ends = run["scores"][metric]["value"], run["scores"][metric]["interval"]
        left.plot([value], [row], "o", color="C0", label="model" if row == 0 else None)
        if ends is not None:
            left.plot(ends, [row, row], color="C0", linewidth=1.5)
        if (baseline := run.get("baseline")) is not None:
            own = baseline["scores"][metric]["value"]
            left.plot(
                [own], [row], "|", color="C1", markersize=12, markeredgewidth=2, label=None if row else "baseline"
            )
        if run["flops"]:
            right.plot([run["flops"]], [value], "o", color="C0")
            right.annotate(
                names[row], (run["flops"], value), fontsize="small", xytext=(4, 4), textcoords="offset points"
            )
    left.set_yticks(range(len(runs)), names)
    left.invert_yaxis()
    left.set(xlabel=f"{label} (bars: 95 %)")
    left.legend(fontsize="small")
    right.set(xlabel="training FLOPs", ylabel=label)
    if any(run["flops"] for run in runs):
        right.set_xscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    targets = figure(result["targets"])
    page.suptitle(f"{result['dataset']}: {targets} targets that all models have", fontsize="medium")
    png = io.BytesIO()
    page.savefig(png, format="png")
    return png.getvalue()
