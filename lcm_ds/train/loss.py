"""The training loss and the input noise, both independent of how rows are split over devices.

The loss is the MEAN over the embed_dim dimensions of a concept, and over targets; that of the LCM paper (arXiv
2412.08821, section 2.3.1) is the SUM over dimensions. Loss and gradients are 1 / embed_dim of the paper's. To use the
paper's recipe, or any other for a summed loss, set

    optim.eps           = eps / embed_dim    1e-5 / 1024 = 9.765625e-9
    optim.max_grad_norm = clip / embed_dim     25 / 1024 = 0.0244140625

and keep everything else: apart from eps, Adam's step does not depend on the scale of the loss. `loss_sum`, our loss
times embed_dim, compares with the paper's. embed_dim is the encoder's: 1024 for SONAR, 384 for MiniLM.

"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lcm_ds.model.counter_rng import normal


def squared_error(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum over targets of the mean squared error over dimensions: divided by the number of targets it is the loss.

    Args:
        predictions: [rows, row_length, embed_dim], normalised space; entry t predicts concept t + 1.
        targets: fp32 [rows, row_length - 1, embed_dim], normalised space: the concepts from the second of each row on,
            without noise. Overwritten, to hold only one fp32 tensor of this size.
        mask: bool [rows, row_length - 1], which of them are targets (`Batch.target_mask`).

    Returns:
        An fp32 scalar.
    """
    error: Tensor = _SquaredError.apply(predictions, targets, mask)
    return error


class _SquaredError(torch.autograd.Function):
    """In one tensor of the size of the targets; autograd would take four."""

    @staticmethod
    def forward(ctx: Any, predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        difference = targets.sub_(predictions[:, :-1]).masked_fill_(~mask.unsqueeze(-1), 0.0)
        ctx.save_for_backward(difference)
        ctx.dtype = predictions.dtype
        return torch.linalg.vector_norm(difference, dim=-1).square().sum() / difference.shape[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        rows, length, embed_dim = difference.shape
        prediction_gradient = torch.empty(rows, length + 1, embed_dim, dtype=ctx.dtype, device=difference.device)
        # Multiplied in fp32, then rounded: fp16 may not hold the loss scale itself.
        torch.mul(difference, gradient * (-2 / embed_dim), out=prediction_gradient[:, :-1])
        prediction_gradient[:, -1] = 0
        return prediction_gradient, None, None


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a run's seed and the name of the draw."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def row_keys(purpose: str, rows: int, seed: int, step: int, first_lane: int) -> Tensor:
    """Keys for the random values of one micro-batch: int64 [rows].

    A row's key is a function of (purpose, seed, step, lane): the same for any world size and micro-batch.

    Args:
        purpose: "noise" or "dropout".
        rows: Of the micro-batch.
        seed: The run's.
        step: The optimizer step.
        first_lane: Row i belongs to lane first_lane + i.
    """
    return torch.tensor([derive_seed(seed, purpose, step, first_lane + row) for row in range(rows)], dtype=torch.int64)


def input_noise(like: Tensor, std: float, keys: Tensor) -> Tensor | None:
    """Gaussian noise for one micro-batch, fp32, in normalised space; None if `std` is 0.

    Args:
        like: [rows, row_length, embed_dim], for the shape.
        std: Standard deviation.
        keys: int64 [rows], on the device of the result (see `row_keys`).
    """
    return None if std == 0 else normal(keys, *like.shape[1:]) * std
