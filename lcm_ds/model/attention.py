"""Causal attention inside segments: flash kernels over packed rows on CUDA, otherwise SDPA or, on CPUs, plain products.

Nothing outside this module depends on which one runs; all agree to rounding.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_ds.model.fused import fused

varlen_attn: Any = None  # flash kernels over segments: CUDA only, and not in every build
if torch.cuda.is_available():  # because the import takes a second
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

WAYS = ("sdpa", "products")  # on CPUs; in bf16 SDPA's gradients are slow there (torch 2.13)
_way = WAYS[0]
# Probabilities of a concept, by the values of a head, up to which products are used: they keep them for backward.
PROBABILITIES = 4

MIN_CAPACITY = 64  # concepts that a cache has room for at first
MEAN_SEGMENT = 32  # concepts; cu_seqlens has room for that many segments, and doubles if they are shorter


class SegmentLayout(NamedTuple):
    """The positions of the segments in a batch of rows, and how attention is computed over them.

    Its tensors have the same shapes for any number of segments (but see MEAN_SEGMENT), so that nothing recompiles from
    batch to batch.
    """

    starts: Tensor  # int64 [rows, row_length]: where in the row this position's segment begins
    positions: Tensor  # int64 [rows, row_length]: from 0 in every segment
    # int32: ends of the segments of all rows one after the other, from 0 on, padded with the last one
    cu_seqlens: Tensor
    max_seqlen: int  # no segment is longer
    full_rows: bool  # every row is one segment
    varlen: bool = False  # whether the flash kernels over segments are used
    products: bool = False  # whether plain products are
    mask: Tensor | None = None  # for SDPA and products, see `prepared`; None if SDPA needs none

    @classmethod
    def from_ids(cls, segment_ids: Tensor, max_seqlen: int, attention: str = "document") -> SegmentLayout:
        """The layout of a batch, on the device of its ids: call it on the CPU, then `prepared`, to avoid a sync.

        Padding becomes segments of max_seqlen at most.

        Args:
            segment_ids: int [rows, row_length], −1 for padding.
            max_seqlen: Concepts of a segment, at most.
            attention: "document"; or "row", if segments of a row see those before them.

        Returns:
            The layout.
        """
        rows, length = segment_ids.shape
        if attention == "row":
            segment_ids, max_seqlen = segment_ids.clamp(max=0), length
        max_seqlen = min(max_seqlen, length)
        index = torch.arange(length, device=segment_ids.device).expand(rows, length)
        begins = torch.ones_like(segment_ids, dtype=torch.bool)
        begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = torch.where(begins, index, 0).cummax(dim=1).values
        positions = index - starts
        if (empty := segment_ids < 0).any():
            positions = torch.where(empty, positions % max_seqlen, positions)
            starts = index - positions
        ends = (positions == 0).flatten().nonzero().flatten()
        return cls(starts, positions, _padded(ends, rows, length), max_seqlen, len(ends) == rows)

    @classmethod
    def one_segment(cls, rows: int, length: int, device: torch.device, offsets: Tensor | None = None) -> SegmentLayout:
        """Every row is one segment that begins at position 0, or at `offsets` [rows] (the lengths in a cache)."""
        index = torch.arange(length, device=device).expand(rows, length)
        positions = index if offsets is None else index + offsets.to(device)[:, None]
        ends = torch.arange(0, rows * length, length, device=device)
        return cls(torch.zeros_like(index), positions, _padded(ends, rows, length), length, True)

    def prepared(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, way: str | None = None
    ) -> SegmentLayout:
        """The same on a device, with all that attention needs.

        Args:
            device: Of queries, keys and values.
            dtype: Theirs.
            head_dim: Values of a head.
            way: One of `WAYS`, on CPUs; None: that of `use`.

        Returns:
            A layout for `attend`.
        """
        starts, positions, cu_seqlens = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        moved = self._replace(starts=starts, positions=positions, cu_seqlens=cu_seqlens)
        if uses_varlen(device, dtype, head_dim):
            return moved._replace(varlen=True)
        few = keys_seen(self) <= PROBABILITIES * head_dim
        if device.type == "cpu" and few and (way or _way) == "products":
            return moved._replace(products=True, mask=moved._mask(dtype))
        return moved._replace(mask=None if self.full_rows else moved._mask(dtype))

    @property
    def blocks(self) -> int:
        """The number of parts, as long as the longest segment, into which rows are cut for SDPA, 1 for none.

        The concepts of a part see at most that part and the one before it.
        """
        length = self.starts.shape[1]
        return length // self.max_seqlen if length % self.max_seqlen == 0 and length > 2 * self.max_seqlen else 1

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """0 for keys that a query sees, else −∞: [rows · blocks, 1, queries, keys] (see `blocks`)."""
        rows, length = self.starts.shape
        count = self.blocks
        queries = torch.arange(length, device=self.starts.device).view(count, 1, -1, 1)
        keys = queries.transpose(2, 3)
        if count > 1:
            keys = torch.cat([keys - self.max_seqlen, keys], dim=3)
        # A key before the row's beginning lies before every segment.
        seen = (keys <= queries) & (keys >= self.starts.view(rows, count, 1, -1, 1))
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf).flatten(0, 1)


def keys_seen(layout: SegmentLayout) -> int:
    """Keys of each query for SDPA and products, those that the mask hides included."""
    length = layout.starts.shape[1]
    return length if layout.blocks == 1 else 2 * layout.max_seqlen


def _padded(ends: Tensor, rows: int, length: int) -> Tensor:
    """Beginnings of segments as cu_seqlens, padded to one of few lengths."""
    total = rows * length
    room = max(rows, -(-total // MEAN_SEGMENT))
    while room < len(ends):
        room *= 2
    cu_seqlens = torch.full((min(room, total) + 1,), total, dtype=torch.int32, device=ends.device)
    cu_seqlens[: len(ends)] = ends
    return cu_seqlens


class Cache:
    """Keys and values of past concepts, layer by layer; rows may have unequal lengths.

    Each layer has its own memory, [rows, heads, capacity, head_dim], which doubles when it is full: a new concept costs
    no copy of those before it. No query sees what lies behind a row's length.
    """

    def __init__(self) -> None:
        self.lengths = torch.zeros(0, dtype=torch.int64)  # [rows], on the CPU: concepts of each row seen so far
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._positions = torch.zeros(0)  # int64 [rows, new], on the device
        self._mask: Tensor | None = None
        self._first: int | None = None  # position of the new concepts in every row; None: each row has its own
        self._end = 0  # of the longest row, the new concepts included

    def layout(self, rows: int, new: int, device: torch.device) -> SegmentLayout:
        """Add `new` concepts to each row; returns the layout with their positions."""
        if not self._layers:
            self.lengths = torch.zeros(rows, dtype=torch.int64)
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        self._first = shortest if shortest == longest else None
        layout = SegmentLayout.one_segment(rows, new, device, self.lengths)
        self._positions = layout.positions
        self._end = longest + new
        self.lengths = self.lengths + new
        # In rows of equal length one new concept sees everything, and many without a past are plainly causal. All else
        # needs a mask.
        self._mask = None
        if self._first is None or (new > 1 and longest > 0):
            self._mask = (torch.arange(self._end, device=device) <= self._positions[:, :, None]).unsqueeze(1)
        return layout

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new concepts' keys and values, [rows, new, heads, head_dim], at the positions of `layout`.

        Returns all of the layer's, [rows, heads, concepts, head_dim].
        """
        if layer == len(self._layers):
            self._layers.append((self._allocate(key), self._allocate(value)))
        elif self._layers[layer][0].shape[2] < self._end:
            self._layers[layer] = (
                self._allocate(key, self._layers[layer][0]),
                self._allocate(value, self._layers[layer][1]),
            )
        for kept, new in zip(self._layers[layer], (key, value), strict=True):
            if self._first is not None:
                kept[:, :, self._first : self._end] = new.transpose(1, 2)
            else:
                rows = torch.arange(len(new), device=new.device).unsqueeze(1)
                kept.transpose(1, 2)[rows, self._positions] = new
        keys, values = self._layers[layer]
        return keys[:, :, : self._end], values[:, :, : self._end]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attention of the new concepts on all before them in their row and on themselves.

        query, key, value, and the result: of the new concepts, [rows, new, heads, head_dim].
        """
        keys, values = self.extend(layer, key, value)
        causal = self._mask is None and query.shape[1] > 1
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=self._mask, is_causal=causal
        )
        return out.transpose(1, 2)

    def truncate(self, lengths: Tensor) -> None:
        """Drop all after `lengths` [rows] concepts of each row, such as the padding of unequal prompts."""
        self.lengths = torch.minimum(self.lengths, lengths.to("cpu", torch.int64))

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(rows)
        self.lengths = self.lengths[index]
        # Layer by layer, so that only one layer is in memory twice.
        for i, kept in enumerate(self._layers):
            keys, values = (tensor.index_select(0, index.to(tensor.device)) for tensor in kept)
            self._layers[i] = keys, values

    def _allocate(self, new: Tensor, old: Tensor | None = None) -> Tensor:
        """Memory for the keys or values of a layer, with the old ones in it."""
        rows, _, heads, width = new.shape
        capacity = max(self._end, MIN_CAPACITY if old is None else 2 * old.shape[2])
        # Zeros, because attention multiplies also what no query sees, by 0.
        made = new.new_zeros(rows, heads, capacity, width)
        if old is not None:
            made[:, :, : old.shape[2]] = old
        return made


def use(way: str) -> None:
    """Compute attention on CPUs in this way from now on, one of `WAYS`."""
    global _way
    _way = way


def uses_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the flash kernels over segments support this device, dtype and head_dim."""
    if varlen_attn is None or device.type != "cuda" or not varlen_takes(dtype, head_dim):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels accept such inputs; unlike SDPA, varlen_attn does not pad a head."""
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def attend(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout) -> Tensor:
    """Causal attention inside each segment; all [rows, row_length, heads, head_dim]. layout: a `prepared` one."""
    rows, length, heads, width = query.shape
    if layout.varlen:
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        ends, longest = layout.cu_seqlens, layout.max_seqlen
        out: Tensor = varlen_attn(query, key, value, ends, ends, longest, longest, window_size=(-1, 0))
        return out.unflatten(0, (rows, length))
    if layout.mask is not None and layout.blocks > 1:
        query, key, value = (tensor.view(rows, layout.blocks, -1, heads, width) for tensor in (query, key, value))
        key, value = (torch.cat([tensor.roll(1, dims=1), tensor], dim=2) for tensor in (key, value))
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if layout.products and layout.mask is not None:
        scores = torch.matmul(query * width**-0.5, key.transpose(2, 3)) + layout.mask
        out = torch.matmul(scores.softmax(-1), value)
    else:
        causal = layout.mask is None
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.mask, is_causal=causal)
    return out.transpose(1, 2).reshape(rows, length, heads, width)


class Rope(NamedTuple):
    """Rotations of RoPE by the positions in a batch."""

    cis: Tensor  # complex64 [rows, row_length, 1, head_dim / 2]: cos + i sin
    cos: Tensor  # fp32 [rows, row_length, 1, head_dim], each twice
    sin: Tensor  # the same, the first of each pair negative

    @classmethod
    def of(cls, positions: Tensor, head_dim: int, theta: float) -> Rope:
        """The rotations of a head's pairs of values.

        Args:
            positions: int [rows, row_length].
            head_dim: Values of a head.
            theta: Base of the angles' geometric series.
        """
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
        angles = (positions.float().unsqueeze(-1) * theta ** (-steps / head_dim)).unsqueeze(2)
        cos, sin = angles.cos(), angles.sin()
        of_pairs = torch.stack((cos, cos), dim=-1), torch.stack((-sin, sin), dim=-1)
        return cls(torch.complex(cos, sin), *(table.flatten(-2) for table in of_pairs))


@fused
def rotate(query: Tensor, key: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """RoPE (arXiv 2104.09864) on interleaved pairs, as in fairseq2, in fp32.

    query, key, and the results: [rows, row_length, heads, head_dim].
    """
    turn = _turn_compiled if torch.compiler.is_compiling() else _turn
    return turn(query, rope), turn(key, rope)


def _turn(x: Tensor, rope: Rope) -> Tensor:
    """By one product of complex numbers, which is a kernel of its own everywhere."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope.cis).flatten(-2).to(x.dtype)


def _turn_compiled(x: Tensor, rope: Rope) -> Tensor:
    """The same to rounding, without complex numbers, for which the compiler makes no kernels."""
    values = x.float()
    swapped = values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (values * rope.cos + swapped * rope.sin).to(x.dtype)
