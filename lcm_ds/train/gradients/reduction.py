"""Gradients under ZeRO-1 in bf16: summed over ranks while the backward pass goes on.

DeepSpeed 0.19.8's `BF16_Optimizer` keeps all gradients in bf16 until the backward pass ends, adds them to fp32 buffers,
sums those over ranks in bf16, and sets them to zero twice a step. Here a hook takes each gradient when it is there and
frees it; a piece of the buffers is sent as soon as its gradients are complete, as torch's DDP does (arXiv 2006.15704,
section 3.2.3). Nothing is set to zero, and only what this rank's optimizer reads is clipped. The values are those of
DeepSpeed, to the last bit where the order of a sum over ranks does not depend on how much is sent at once, as with two
ranks. But a single rank sends nothing, so that its sums stay in fp32; and a parameter without a gradient on this rank
has a zero, which DeepSpeed leaves out of the norm and does not clip (findings/deepspeed-bf16-clips-by-rank.sh).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

# Most values that are sent as one, unless a parameter has more: 32 MiB in bf16, as much as DDP's 25 MiB by default.
PIECE = 1 << 24


def reduce_in_backward(engine: Any) -> None:
    """Have an engine sum its gradients over ranks during the backward pass, if its optimizer is a BF16_Optimizer.

    Args:
        engine: DeepSpeed's, before its first backward pass.
    """
    optimizer = engine.optimizer
    # Scaling before the sum and mixtures of experts are left to DeepSpeed.
    plain = getattr(engine, "postscale_gradients", bool)() and engine.gradient_predivide_factor() == 1.0
    if isinstance(optimizer, BF16_Optimizer) and plain and not optimizer.has_moe_layers:
        Reduction(engine)


def _cut(offsets: Sequence[int], most: int) -> Iterator[range]:
    """Consecutive parameters that have at most so many values, or a single one that has more: the last ones first.

    Args:
        offsets: Where each parameter begins, and where the last one ends.
        most: Number of values.
    """
    last = len(offsets) - 1
    while last:
        first = last - 1
        while first and offsets[last] - offsets[first - 1] <= most:
            first -= 1
        yield range(first, last)
        last = first


@dataclass
class _Piece:
    """Consecutive parameters of a group: a range of its flat buffers, sent as one."""

    sums: Tensor  # fp32, a view of DeepSpeed's buffer, which clipping and the optimizer read
    gradients: list[_Gradient] = field(default_factory=list)
    sent: Tensor | None = None  # the sums of this rank's micro-batches, in the dtype that ranks exchange
    ready: int = 0  # gradients that are in `sent`
    work: Any = None  # torch.distributed.Work


@dataclass
class _Gradient:
    """A parameter's place in its piece."""

    piece: _Piece
    begin: int
    end: int
    added: bool = False  # that of one of the step's micro-batches at least
    ready: bool = False  # in `sent`

    @property
    def sums(self) -> Tensor:
        return self.piece.sums[self.begin : self.end]


class Reduction:
    """The sums of an engine's gradients, over micro-batches and ranks."""

    def __init__(self, engine: Any) -> None:
        """Take the place of what DeepSpeed does after the backward pass.

        Args:
            engine: DeepSpeed's, with a BF16_Optimizer.
        """
        self._engine, self._optimizer = engine, engine.optimizer
        optimizer = self._optimizer
        self._dtype, self._ranks = engine.communication_data_type, dist.get_world_size(optimizer.dp_process_group)
        for hook in optimizer._grad_acc_hooks:  # of bf16.immediate_grad_update
            hook.remove()
        optimizer._grad_acc_hooks = []
        most = min(PIECE, engine.zero_reduce_bucket_size())
        places = {parameter: place for place, parameter in enumerate(engine.module.parameters())}
        pieces: list[tuple[int, _Piece]] = []  # with the place of the parameter whose gradient comes last
        for number, parameters in enumerate(optimizer.bf16_groups):
            offsets = [0, *accumulate(parameter.numel() for parameter in parameters)]
            for chosen in _cut(offsets, most):
                begin, end = offsets[chosen.start], offsets[chosen.stop]
                piece = _Piece(optimizer.fp32_groups_gradients_flat[number][begin:end])
                for each in chosen:
                    gradient = _Gradient(piece, offsets[each] - begin, offsets[each + 1] - begin)
                    piece.gradients.append(gradient)
                    hook = parameters[each].register_post_accumulate_grad_hook(partial(self._take, gradient))
                    optimizer._grad_acc_hooks.append(hook)  # DeepSpeed removes it with the engine
                pieces.append((min(places[parameters[each]] for each in chosen), piece))
        # The backward pass goes from the last parameters to the first; all ranks send in this order.
        self._pieces = [piece for _, piece in sorted(pieces, key=lambda each: -each[0])]
        self._gradients = [gradient for piece in self._pieces for gradient in piece.gradients]
        optimizer.immediate_grad_update = True  # nothing is left to do after the backward pass
        optimizer.clear_hp_grads = self._forget
        optimizer.get_grads_for_norm = partial(self._gradients_of, optimizer.get_grads_for_norm)
        engine.buffered_allreduce_fallback = self._finish
        self._forget()

    @torch.no_grad()
    def _take(self, gradient: _Gradient, parameter: nn.Parameter) -> None:
        """Add a parameter's gradient of a micro-batch; that of the last one makes it ready."""
        assert parameter.grad is not None
        new, parameter.grad = parameter.grad.flatten(), None
        last = self._engine.is_gradient_accumulation_boundary()
        if gradient.added:
            new = gradient.sums.add_(new)
        elif not (last and self._ranks > 1):
            gradient.sums.copy_(new)
        gradient.added = True
        if last and self._ranks > 1:
            self._make_ready(gradient, new)

    def _make_ready(self, gradient: _Gradient, value: Tensor | float) -> None:
        """Put the sum of this rank's micro-batches where it is sent from, and send what is complete, in order."""
        assert not gradient.ready, "a parameter has two gradients in a backward pass"
        piece = gradient.piece
        if piece.sent is None:
            piece.sent = torch.empty_like(piece.sums, dtype=self._dtype)
        piece.sent[gradient.begin : gradient.end] = value
        gradient.ready = True
        piece.ready += 1
        while self._upcoming and self._upcoming[0].ready == len(self._upcoming[0].gradients):
            piece = self._upcoming.popleft()
            piece.work = dist.all_reduce(piece.sent, group=self._optimizer.dp_process_group, async_op=True)

    @torch.no_grad()
    def _finish(self, **_: Any) -> None:
        """The means over ranks; called after the last backward pass of a step. A missing gradient counts as zero."""
        for gradient in self._gradients:
            if self._ranks == 1 and not gradient.added:
                gradient.sums.zero_()
            elif self._ranks > 1 and not gradient.ready:
                self._make_ready(gradient, gradient.sums if gradient.added else 0.0)
        scale = 1 / self._ranks if self._engine.gradient_average else 1.0
        for piece in self._pieces if self._ranks > 1 else ():
            assert piece.sent is not None
            assert piece.work is not None
            piece.work.wait()
            torch.mul(piece.sent, scale, out=piece.sums)
            piece.sent = piece.work = None
        self._finished = True
        self._optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in self._optimizer.bf16_groups]

    def _gradients_of(self, original: Callable[[], Any], for_clipping: bool = False) -> Any:
        """What DeepSpeed computes norms of, or clips: only this rank's partition, which the optimizer reads.

        With Muon, which reads complete matrices, nothing is clipped (deepspeed_config/resolver.py).
        """
        if not self._finished:
            raise RuntimeError("DeepSpeed took a step without summing gradients over ranks: use version 0.19.8")
        return self._optimizer.fp32_groups_gradient_flat_partition if for_clipping else original()

    def _forget(self) -> None:
        """Begin a step; called after each, whether it was applied or skipped."""
        for gradient in self._gradients:
            gradient.added = gradient.ready = False
        for piece in self._pieces:
            piece.ready = 0
        self._upcoming, self._finished = deque(self._pieces), False
