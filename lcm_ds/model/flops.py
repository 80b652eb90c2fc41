"""Model FLOPs of training, counted exactly, for the utilisation (mfu) that a run reports."""

from __future__ import annotations

from lcm_ds.model.sizes import Sizes


def matrix_weights(config: Sizes) -> int:
    """Weights of all matrices: pre-net, post-net, and in each layer four of attention and three of the SwiGLU."""
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    return 2 * config.embed_dim * config.hidden_size + config.num_hidden_layers * layer


def training_flops(config: Sizes, concepts: int, pairs: int) -> int:
    """FLOPs of forward and backward over `concepts` concepts; recomputation is not counted.

    pairs: of a concept with each that it sees, itself included: n · (n + 1) / 2 for a segment of n. A matrix costs 2
    FLOPs a weight and concept. Attention in a layer costs 2 · 2 · hidden_size a pair (q·k, then the weighted sum). The
    backward pass costs twice the forward (arXiv 2204.02311, appendix B).
    """
    forward = 2 * matrix_weights(config) * concepts + config.num_hidden_layers * 4 * config.hidden_size * pairs
    return 3 * forward
