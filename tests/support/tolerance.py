"""How far two right results may lie apart on any machine, from the bits of a type and the number of terms of sums.

Kernels add the terms of a sum in an order of their own: another for each instruction set, library, number of threads
and size of a batch. A sum of n terms in floating point is off by at most n·u of the sum of their sizes, u = eps/2, in
any order (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and the errors of sums that follow one
another add up. Two results differ by twice that.
"""

from __future__ import annotations

import torch

from lcm_ds.model.config import BaseLCMConfig


def rounding(terms: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """The difference of two results behind sums of so many terms in all, each of whose sizes add up to `size`."""
    return torch.finfo(dtype).eps * terms * size


def layers(count: int, hidden: int, heads: int, inner: int, length: int) -> int:
    """Terms of the sums that follow one another in so many transformer layers, over a row of `length`."""
    norms, projections = 2 * hidden, 2 * hidden + hidden + inner  # query, key and value; out; up; down
    attention = hidden // heads + 2 * length  # scores, softmax, values
    return count * (norms + projections + attention)


def rounding_of(config: BaseLCMConfig, length: int, size: float = 1.0) -> float:
    """The difference of two predictions of a Base-LCM in float32 behind `length` concepts, of about `size`."""
    inside = layers(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        length,
    )
    return rounding(config.embed_dim + inside + 2 * config.hidden_size, size)  # pre-net; last norm, post-net
