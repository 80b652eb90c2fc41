"""Raw space ↔ normalised space: per dimension, less the median, over the scaled interquartile range."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


class Normalizer(nn.Module):
    """Holds `center` and `scale` [embed_dim] as buffers that stay fp32 whatever the model is cast to."""

    center: Tensor
    scale: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(embed_dim, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(embed_dim, dtype=torch.float32))

    def set(self, center: np.ndarray, scale: np.ndarray) -> None:
        """Take over a dataset's normaliser; both [embed_dim], raw space."""
        self.center.copy_(torch.from_numpy(np.asarray(center, np.float32)))
        self.scale.copy_(torch.from_numpy(np.asarray(scale, np.float32)))

    def normalize(self, concepts: Tensor) -> Tensor:
        """[…, embed_dim] in raw space → fp32 in normalised space."""
        # fp16 and bf16 become fp32 in the same pass, and nothing else is kept of them.
        concepts = concepts.float() if concepts.dtype == torch.float64 else concepts
        return (concepts - self.center).div_(self.scale)

    def denormalize(self, concepts: Tensor) -> Tensor:
        """[…, embed_dim] in normalised space → fp32 in raw space."""
        return concepts.float() * self.scale + self.center

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalizer:
        """Moves to another device as asked, but is never cast: rounding here would shift every concept."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self
