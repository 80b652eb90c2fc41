"""Causal attention inside segments: flash kernels over packed rows on CUDA, a masked SDPA elsewhere.

Nothing outside this module knows which one runs; both agree to rounding.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

varlen_attn: Any = None
with contextlib.suppress(ImportError):  # flash kernels over segments: CUDA only, and not in every build
    from torch.nn.attention.varlen import varlen_attn


class SegmentLayout(NamedTuple):
    """Where the segments of a batch of rows lie.

    Its tensors have the same shapes for any number of segments, so that nothing recompiles from batch to batch.
    """

    starts: Tensor  # int64 [rows, row_length]: where in the row the segment of this position begins
    positions: Tensor  # int64 [rows, row_length]: from 0 in every segment
    # int32 [rows * row_length + 1]: ends of the segments of all rows one after the other, padded with the last one
    cu_seqlens: Tensor
    max_seqlen: int  # no segment is longer

    @classmethod
    def from_ids(cls, segment_ids: Tensor, max_seqlen: int) -> SegmentLayout:
        """The layout of int [rows, row_length] segment ids, -1 where padded; each padded position stands alone.

        Made on the ids' device: call it on the CPU, and `to` afterwards, so that no device is waited for.
        """
        rows, length = segment_ids.shape
        index = torch.arange(length, device=segment_ids.device).expand(rows, length)
        begins = torch.ones_like(segment_ids, dtype=torch.bool)
        begins[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]) | (segment_ids[:, 1:] < 0)
        starts = torch.where(begins, index, 0).cummax(dim=1).values
        total = rows * length
        first = begins.flatten().nonzero().flatten()
        cu_seqlens = torch.full((total + 1,), total, dtype=torch.int32, device=segment_ids.device)
        cu_seqlens[: len(first)] = first
        return cls(starts, index - starts, cu_seqlens, min(max_seqlen, length))

    @classmethod
    def one_segment(cls, rows: int, length: int, device: torch.device, offset: int = 0) -> SegmentLayout:
        """Every row is one segment, whose first position is `offset` (what a cache already holds)."""
        index = torch.arange(length, device=device).expand(rows, length)
        ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
        cu_seqlens = F.pad(ends, (0, rows * length - rows), value=rows * length)
        return cls(torch.zeros_like(index), index + offset, cu_seqlens, length)

    def to(self, device: torch.device) -> SegmentLayout:
        """The same on another device."""
        starts, positions, cu_seqlens = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        return SegmentLayout(starts, positions, cu_seqlens, self.max_seqlen)

    def mask(self) -> Tensor:
        """bool [rows, 1, row_length, row_length]: may position i look at position j?"""
        length = self.starts.shape[1]
        index = torch.arange(length, device=self.starts.device)
        same = self.starts.unsqueeze(2) == self.starts.unsqueeze(1)
        return (same & (index.unsqueeze(1) >= index)).unsqueeze(1)


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


def attend(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, mask: Tensor | None) -> Tensor:
    """Causal attention inside each segment; all [rows, row_length, heads, head_dim].

    mask: `layout.mask()`, made once for all layers, where `uses_varlen` is false; else None.
    """
    if mask is None:
        rows, length = query.shape[:2]
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        ends, longest = layout.cu_seqlens, layout.max_seqlen
        out: Tensor = varlen_attn(query, key, value, ends, ends, longest, longest, window_size=(-1, 0))
        return out.unflatten(0, (rows, length))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


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
