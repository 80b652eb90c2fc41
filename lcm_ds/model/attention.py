"""Causal attention inside segments: flash kernels over packed rows on CUDA, SDPA elsewhere.

Nothing outside this module knows which one runs; both agree to rounding.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

varlen_attn: Any = None  # flash kernels over segments: CUDA only, and not in every build
if torch.cuda.is_available():  # for the import takes a second
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

MEAN_SEGMENT = 32  # concepts; cu_seqlens has room for so many segments, and for twice as many where they are shorter


class SegmentLayout(NamedTuple):
    """Where the segments of a batch of rows lie, and how attention is to be computed over them.

    Its tensors have the same shapes for any number of segments (but see MEAN_SEGMENT), so that nothing recompiles from
    batch to batch.
    """

    starts: Tensor  # int64 [rows, row_length]: where in the row the segment of this position begins
    positions: Tensor  # int64 [rows, row_length]: from 0 in every segment
    # int32: ends of the segments of all rows one after the other, from 0 on, padded with the last one
    cu_seqlens: Tensor
    max_seqlen: int  # no segment is longer
    whole_rows: bool  # every row is one segment
    varlen: bool = False  # whether the flash kernels over segments serve
    mask: Tensor | None = None  # for SDPA, see `prepared`; None where it needs none

    @classmethod
    def from_ids(cls, segment_ids: Tensor, max_seqlen: int, attention: str = "document") -> SegmentLayout:
        """The layout of int [rows, row_length] segment ids, −1 where there are no concepts.

        attention: "document", or "row", where segments of a row see those before them: between two gaps all is one.
        Positions without concepts make segments of their own, as long as max_seqlen at most. Made on the ids' device:
        call it on the CPU, and `prepared` afterwards, so that no device is waited for.
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
    def one_segment(cls, rows: int, length: int, device: torch.device, offset: int = 0) -> SegmentLayout:
        """Every row is one segment, whose first position is `offset` (what a cache already holds)."""
        index = torch.arange(length, device=device).expand(rows, length)
        ends = torch.arange(0, rows * length, length, device=device)
        return cls(torch.zeros_like(index), index + offset, _padded(ends, rows, length), length, True)

    def prepared(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> SegmentLayout:
        """The same on `device`, with all that attention of this dtype and width of a head asks for."""
        starts, positions, cu_seqlens = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        moved = self._replace(starts=starts, positions=positions, cu_seqlens=cu_seqlens)
        if uses_varlen(device, dtype, head_dim):
            return moved._replace(varlen=True)
        return moved._replace(mask=None if self.whole_rows else moved._mask(dtype))

    @property
    def blocks(self) -> int:
        """Of how many parts SDPA takes a row, each as long as the longest segment: a part and the one before it are
        all that its concepts may see. 1: it takes whole rows.
        """
        length = self.starts.shape[1]
        return length // self.max_seqlen if length % self.max_seqlen == 0 and length > 2 * self.max_seqlen else 1

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """0 where a position may look at another, else −∞: [rows · blocks, 1, queries, keys] (see `blocks`)."""
        rows, length = self.starts.shape
        count = self.blocks
        queries = torch.arange(length, device=self.starts.device).view(count, 1, -1, 1)
        keys = queries.transpose(2, 3)
        if count > 1:
            keys = torch.cat([keys - self.max_seqlen, keys], dim=3)
        # A key before the row's beginning lies before every segment.
        seen = (keys <= queries) & (keys >= self.starts.view(rows, count, 1, -1, 1))
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf).flatten(0, 1)


def _padded(ends: Tensor, rows: int, length: int) -> Tensor:
    """Beginnings of segments as cu_seqlens, of a length that only few others differ from."""
    total = rows * length
    room = max(rows, -(-total // MEAN_SEGMENT))
    while room < len(ends):
        room *= 2
    cu_seqlens = torch.full((min(room, total) + 1,), total, dtype=torch.int32, device=ends.device)
    cu_seqlens[: len(ends)] = ends
    return cu_seqlens


class Cache:
    """Keys and values of the concepts seen so far, layer by layer: [rows, heads, concepts, head_dim] each."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Concepts seen so far."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new concepts' keys and values; returns all of them."""
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            old_key, old_value = self.layers[layer]
            self.layers[layer] = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        return self.layers[layer]


def uses_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the flash kernels over segments serve this device, dtype and width of a head."""
    if varlen_attn is None or device.type != "cuda" or not varlen_takes(dtype, head_dim):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_takes(dtype: torch.dtype, head_dim: int) -> bool:
    """What the kernels ask of their inputs; unlike SDPA, varlen_attn does not pad a head."""
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
    causal = layout.mask is None
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.mask, is_causal=causal)
    return out.transpose(1, 2).reshape(rows, length, heads, width)


def attend_cached(query: Tensor, key: Tensor, value: Tensor, layer: int, cache: Cache) -> Tensor:
    """Attention of new concepts on all that the cache holds and on themselves; all [rows, new, heads, head_dim]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    key, value = cache.extend(layer, key, value)
    new, total = query.shape[2], key.shape[2]
    mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) on interleaved pairs, as fairseq2 has it, in fp32.

    tensor: [rows, row_length, heads, head_dim]; cos, sin: fp32 [rows, row_length, 1, head_dim / 2].
    """
    even, odd = tensor.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(tensor.dtype)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [rows, row_length, 1, head_dim / 2], of positions [rows, row_length]."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float().unsqueeze(-1) * theta ** (-steps / head_dim)
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
