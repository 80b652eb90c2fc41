"""The tolerance between two correct results on any machine, from the bits of a type and the number of terms of sums.

The order in which kernels add the terms of a sum depends on instruction set, library, number of threads and batch size.
In any order, a floating-point sum of n terms has an error of at most n·u times the sum of their absolute values,
u = eps/2 (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and errors of consecutive sums add up.
Two results differ by at most twice that.
"""

from __future__ import annotations

import torch

from lcm_ds.model.config import BaseLCMConfig


def rounding(terms: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """The difference of two results of sums of `terms` terms in total, whose absolute values add up to `size`."""
    return torch.finfo(dtype).eps * terms * size


def layers(count: int, hidden: int, heads: int, inner: int, length: int) -> int:
    """The terms of consecutive sums in `count` transformer layers, over a row of `length`."""
    norms, projections = 2 * hidden, 2 * hidden + hidden + inner  # query, key and value; out; up; down
    attention = hidden // heads + 2 * length  # scores, softmax, values
    return count * (norms + projections + attention)


def rounding_of(config: BaseLCMConfig, length: int, size: float = 1.0) -> float:
    """The difference of two float32 predictions of a Base-LCM after `length` concepts, of about `size`."""
    inside = layers(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        length,
    )
    return rounding(config.embed_dim + inside + 2 * config.hidden_size, size)  # pre-net; last norm, post-net
