"""How far two right results may lie apart on any machine, from the bits of a type and the number of terms of sums.

Kernels add the terms of a sum in an order of their own: another for each instruction set, library, number of threads
and size of a batch. A sum of n terms in floating point is off by at most n·u of the sum of their sizes, u = eps/2, in
any order (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and the errors of sums that follow one
another add up. Two results differ by twice that.
"""

from __future__ import annotations

import torch

from lcm_ds.model.config import BaseLCMConfig


def rounding(dtype: torch.dtype, *terms: int, size: float = 1.0) -> float:
    """The difference of two results behind sums of so many terms, one after another, whose sizes add up to `size`."""
    return torch.finfo(dtype).eps * sum(terms) * size


def rounding_of(config: BaseLCMConfig, concepts: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> float:
    """The difference of two predictions of a Base-LCM behind so many concepts, of about `size`, normalised space."""
    hidden = config.hidden_size
    head = hidden // config.num_attention_heads
    # both norms; query, key and value at a time; scores, weights and values; out; gate and up at a time; down
    layer = (hidden, hidden, hidden, head, concepts, concepts, hidden, hidden, config.intermediate_size)
    return rounding(dtype, config.embed_dim, *layer * config.num_hidden_layers, hidden, hidden, size=size)
