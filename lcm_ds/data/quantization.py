"""Stored forms of concepts: 8 bits, half the bytes of fp16, and bf16 as uint16.

A step is 8/127 of the dimension's scale (its standard deviation, robustly), so that the 127 steps to each side reach 8
standard deviations. Rounding errs by step/√12, 1.8 % of a standard deviation; the noise that training adds to its
inputs is 5 % by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

CLIP_SIGMA = 8.0  # standard deviations; values beyond are clipped
STEPS = 127


@dataclass(frozen=True)
class Quantization:
    """center, step: float32 [embed_dim] each, raw space. A concept is center + step · q, q in −127 … 127."""

    center: np.ndarray
    step: np.ndarray

    dtype: ClassVar[type] = np.float16  # of decoded concepts

    @classmethod
    def of(cls, center: np.ndarray, scale: np.ndarray) -> Quantization:
        """From a normaliser's numbers, [embed_dim] each."""
        return cls(np.asarray(center, np.float32), np.asarray(scale, np.float32) * np.float32(CLIP_SIGMA / STEPS))

    def encode(self, concepts: np.ndarray) -> np.ndarray:
        """int8 [n, embed_dim] of finite concepts [n, embed_dim], raw space."""
        steps = np.rint((np.asarray(concepts, np.float32) - self.center) / self.step)
        return np.clip(steps, -STEPS, STEPS).astype(np.int8)

    def decode(self, stored: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Concepts [n, embed_dim], raw space, from `encode`d ones; float16, or in `out` and its dtype."""
        if out is None:
            out = np.empty(stored.shape, self.dtype)
        concepts = np.multiply(stored, self.step, dtype=np.float32)
        concepts += self.center
        out[...] = concepts
        return out


@dataclass(frozen=True)
class BFloat16:
    """bf16 as uint16, which NumPy has no type for: the upper half of a float32."""

    dtype: ClassVar[type] = np.float32

    def decode(self, stored: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """float32 [n, embed_dim], or `out` in its dtype, of uint16 [n, embed_dim]."""
        concepts = (stored.astype(np.uint32) << 16).view(np.float32)
        if out is None:
            return concepts
        out[...] = concepts
        return out
