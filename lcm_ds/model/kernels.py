"""The ways to compute the same on a CPU, of which the fastest differs by processor, dtype and shape: it is measured.

All agree to rounding. On GPUs there is no choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from lcm_ds.model import attention, linear
from lcm_ds.model.attention import SegmentLayout, attend
from lcm_ds.model.sizes import Sizes

PRODUCTS = linear.PIECES
# Piece of a step → the ways to compute it. The first is used unless another is measured to be faster.
WAYS = {"attention": attention.WAYS, **dict.fromkeys(PRODUCTS, linear.WAYS)}
MARGIN = 1.25  # another way has to be that much faster: measuring again must not change the choice
FEWEST = 2**24  # floating-point operations of a piece in a layer; below that it is not measured
REPEATS = 4  # of each way, of which the fastest counts
MEASURED = 256  # concepts of a micro-batch that measuring takes, at most,
SUMMED = 2**33  # and for gradients of weights, which are sums over them: as many as take this many operations


_in_use: dict[str, str] = {}


def in_use() -> dict[str, str]:
    """Piece → way, as last given to `use`."""
    return dict(_in_use)


def use(ways: Mapping[str, str]) -> None:
    """Compute with these ways from now on, in this process; with the first way of each piece that is not named."""
    _in_use.clear()
    _in_use.update(ways)
    attention.use(ways.get("attention", attention.WAYS[0]))
    linear.use({piece: ways.get(piece, linear.WAYS[0]) for piece in PRODUCTS})


def measure(
    sizes: Sizes, rows: int, row_length: int, max_segment: int, dtype: torch.dtype, fixed: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Measure on this CPU which ways are the fastest for a run's shapes, in a fraction of a second.

    By the processor time of one thread, which other processes hardly change.

    Args:
        sizes: The model's.
        rows: Of a micro-batch.
        row_length: Concepts of a row.
        max_segment: Concepts of a segment, at most.
        dtype: Of the model.
        fixed: Pieces whose way is given.

    Returns:
        Piece → way, for all pieces; and for each that does not have its first way, why.
    """
    chosen = {piece: fixed.get(piece, ways[0]) for piece, ways in WAYS.items()}
    reasons = [f"{piece} by {way}, as configured" for piece, way in fixed.items() if way != WAYS[piece][0]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for piece, calls in _calls(sizes, rows, row_length, max_segment, dtype).items():
            if piece in fixed:
                continue
            times = _fastest(calls)
            default, best = WAYS[piece][0], min(times, key=times.__getitem__)
            if times[default] > MARGIN * times[best]:
                chosen[piece] = best
                reasons.append(f"{piece} by {best}, {times[default] / times[best]:.1f} times as fast as {default}")
    finally:
        torch.set_num_threads(threads)
    return chosen, reasons


def _fastest(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest of some calls, taken in turn, after one for warm-up."""
    times = dict.fromkeys(calls, math.inf)
    for repeat in range(REPEATS + 1):
        for way, call in calls.items():
            started = time.thread_time()
            call()
            if repeat:
                times[way] = min(times[way], time.thread_time() - started)
    return times


def _calls(
    sizes: Sizes, rows: int, row_length: int, max_segment: int, dtype: torch.dtype
) -> dict[str, dict[str, Callable[[], object]]]:
    """Piece → way → a call that computes it once; only for pieces with a choice and enough work."""
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    concepts, cpu, generator = rows * row_length, torch.device("cpu"), torch.Generator().manual_seed(0)
    rows = min(rows, max(1, MEASURED // row_length))
    ids = torch.arange(row_length, dtype=torch.int32).expand(rows, -1) // max(1, max_segment // 2)
    layout = SegmentLayout.from_ids(ids, max_segment, sizes.attention)
    seen = attention.keys_seen(layout)
    if 4 * concepts * seen * sizes.hidden_size >= FEWEST:
        shape = rows, row_length, sizes.hidden_size // sizes.head_dim, sizes.head_dim
        query, key, value = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3))
        for way in attention.WAYS:
            prepared = layout.prepared(cpu, dtype, sizes.head_dim, way)
            calls.setdefault("attention", {})[way] = partial(_attend_and_back, query, key, value, prepared)
    inner, some = 2 * sizes.intermediate_size, min(concepts, MEASURED)
    if linear.by_onednn(torch.empty(0, dtype=dtype)) and 2 * some * sizes.hidden_size * inner >= FEWEST:
        summed = min(concepts, max(some, SUMMED // (2 * sizes.hidden_size * inner)))
        x, gradient, weight = (
            torch.randn(shape, generator=generator)
            for shape in ((summed, sizes.hidden_size), (summed, inner), (inner, sizes.hidden_size))
        )
        factors = {
            "outputs": (x[:some], weight),
            "gradients of inputs": (gradient[:some], weight.t()),
            "gradients of weights": (gradient.t(), x.t()),
        }
        for piece in PRODUCTS:
            for way in linear.WAYS:
                calls.setdefault(piece, {})[way] = partial(linear.product, *factors[piece], way=way)
    return calls


def _attend_and_back(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout) -> tuple[Tensor, ...]:
    """The gradients of attention, with the query as that of its result."""
    return torch.autograd.grad(attend(query, key, value, layout), (query, key, value), query)
