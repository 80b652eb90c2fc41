"""Gradients in bf16, added up in fp32: summed over ranks while the backward pass goes on.

Under ZeRO 1 and 2, and on CPUs under ZeRO 3, a hook takes each gradient when it is there and frees it. A piece of
neighbouring gradients is sent as soon as it is complete, as torch's DDP does (arXiv 2006.15704, section 3.2.3), and
only a few pieces are under way at a time. Nothing is set to zero before it is written. Each rank takes the sums of its
partition; on CPUs, of two ranks and under ZeRO 3, it is sent no others (distributed/gloo.py).

Under ZeRO-1 DeepSpeed 0.19.8's `BF16_Optimizer` keeps all gradients until the backward pass ends, sums them then, and
clips what other ranks update, too. Its ZeRO 2 and 3 copy them before and after each sum, and on CPUs wait for it. On
two ranks the sums are DeepSpeed's to the last bit; on more, they are so to rounding, as the order of a sum is
another. But under ZeRO-1 a single rank sends nothing, so that its sums stay in fp32; and a parameter without a
gradient on this rank has a zero, which BF16_Optimizer leaves out of the norm and does not clip
(findings/deepspeed-bf16-clips-by-rank.sh). The optimizer's states must not be moved between the backward pass and the
step (DeepSpeed's `offload_states`), as the pieces are views of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from lcm_ds.distributed.gloo import SumOfParts

# Most values that are sent as one, unless a parameter has more: 32 MiB in bf16, as much as DDP's 25 MiB by default.
PIECE = 1 << 24
UNDER_WAY = 4  # pieces, at most: the backward pass waits for the first before it sends another


def reduce_in_backward(engine: Any) -> None:
    """Have an engine sum its gradients over ranks during the backward pass, if it can.

    Args:
        engine: DeepSpeed's, before its first backward pass.
    """
    optimizer = engine.optimizer
    # Scaling before the sum and mixtures of experts are left to DeepSpeed.
    plain = getattr(engine, "postscale_gradients", bool)() and engine.gradient_predivide_factor() == 1.0
    if not plain or getattr(engine, "has_moe_layers", True) or getattr(optimizer, "mpu", None) is not None:
        return
    if isinstance(optimizer, BF16_Optimizer):
        OncePerStep(engine)
    elif type(optimizer) is DeepSpeedZeroOptimizer and EachMicroBatch.fits(optimizer):
        EachMicroBatch(engine)
    elif type(optimizer) is DeepSpeedZeroOptimizer_Stage3 and OfPartitioned.fits(engine):
        OfPartitioned(engine)


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


def _over_gloo(group: Any) -> bool:
    return str(torch.distributed.get_backend(group)) == "gloo"


def _ranks(group: Any) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)


def _bounds(begin: int, end: int, partition: int, ranks: int) -> list[int]:
    """Of the values from `begin` to `end` of a group, where those of each rank begin, and where the last ones end.

    Args:
        begin: First value.
        end: After the last value.
        partition: Number of values of a rank; those of rank 0 come first.
        ranks: Number of ranks.
    """
    return [min(max(rank * partition, begin), end) for rank in range(ranks + 1)]


@dataclass
class _Piece:
    """Consecutive parameters of a group, sent as one."""

    parts: list[int]  # how many of the values the optimizer of each rank reads
    sums: Tensor  # fp32, over ranks, of the values that this rank needs; a view of what DeepSpeed's optimizer reads
    accumulated: Tensor | None  # fp32 [size], over micro-batches of this rank; holds `sums`, too
    gradients: list[_Gradient] = field(default_factory=list)
    sent: Tensor | None = None  # of this rank, in the dtype that ranks exchange
    ready: int = 0  # gradients that are in `sent`
    streams: list[Any] = field(default_factory=list)  # of a GPU; those that wrote to `sent`
    receive: Callable[[], Tensor] | None = None  # waits for the sums of this rank's part
    received: bool = False  # the sums are of this step

    @property
    def size(self) -> int:
        """Number of values, of all ranks."""
        return sum(self.parts)


@dataclass
class _Gradient:
    """A parameter's place in its piece."""

    piece: _Piece
    begin: int
    end: int
    added: bool = False  # that of one of the step's micro-batches at least is in `accumulated`
    ready: bool = False  # in `sent`

    @property
    def accumulated(self) -> Tensor:
        """Over micro-batches of this rank, where it has room for all values."""
        assert self.piece.accumulated is not None
        return self.piece.accumulated[self.begin : self.end]


class Reduction:
    """The sums of an engine's gradients, over micro-batches and ranks."""

    def __init__(
        self,
        engine: Any,
        groups: Sequence[Sequence[Any]],
        make_piece: Callable[[int, int, int], _Piece],
        complete: bool = False,
        partitioned: bool = False,
    ) -> None:
        """Cut all parameters into pieces.

        Args:
            engine: DeepSpeed's.
            groups: Its parameters, group by group, as they lie one after the other in its optimizer.
            make_piece: Called with a group's number and the bounds of a piece's values in it.
            complete: Whether every rank needs the sums of all values.
            partitioned: Whether these are the values of one rank, of each parameter.
        """
        self._engine, self._optimizer = engine, engine.optimizer
        self._dtype, self._process_group = engine.communication_data_type, self._optimizer.dp_process_group
        self._ranks, self._complete = dist.get_world_size(self._process_group), complete
        self._on_cpus = _over_gloo(self._process_group)
        self._scale = 1 / self._ranks if engine.gradient_average else 1.0
        self._under_way: deque[_Piece] = deque()
        self._gradients: dict[nn.Parameter, _Gradient] = {}
        most = min(PIECE, engine.zero_reduce_bucket_size()) // (self._ranks if partitioned else 1)
        places = {parameter: place for place, parameter in enumerate(engine.module.parameters())}
        pieces: list[tuple[int, _Piece]] = []  # with the place of the parameter whose gradient comes last
        for group, parameters in enumerate(groups):
            sizes = (each.partition_numel() if partitioned else each.numel() for each in parameters)
            ends = [0, *accumulate(sizes)]
            for chosen in _cut(ends, most):
                begin, end = ends[chosen.start], ends[chosen.stop]
                piece = make_piece(group, begin, end)
                for each in chosen:
                    gradient = _Gradient(piece, ends[each] - begin, ends[each + 1] - begin)
                    piece.gradients.append(gradient)
                    self._gradients[parameters[each]] = gradient
                pieces.append((min(places[parameters[each]] for each in chosen), piece))
        # The backward pass goes from the last parameters to the first; all ranks send in this order.
        self._pieces = [piece for _, piece in sorted(pieces, key=lambda each: -each[0])]
        self._begin_pass()

    def _begin_pass(self) -> None:
        """Wait for the gradients of all parameters."""
        for gradient in self._gradients.values():
            gradient.ready = False
        for piece in self._pieces:
            piece.ready = 0
        self._upcoming = deque(self._pieces)

    def _begin_step(self) -> None:
        """Forget all sums."""
        for gradient in self._gradients.values():
            gradient.added = False
        for piece in self._pieces:
            piece.received = False

    def _add(self, gradient: _Gradient, new: Tensor) -> None:
        """Add a gradient of this rank to its sums."""
        if gradient.added:
            gradient.accumulated.add_(new)
        else:
            gradient.accumulated.copy_(new)
        gradient.added = True

    def _make_ready(self, gradient: _Gradient, value: Tensor | float) -> None:
        """Copy this rank's part of a sum to its piece, and send the pieces that are complete, in order."""
        assert not gradient.ready, "a parameter has two gradients in a backward pass"
        piece = gradient.piece
        if piece.sent is None:
            piece.sent = torch.empty(piece.size, dtype=self._dtype, device=piece.sums.device)
        self._put(gradient, value)
        if piece.sent.is_cuda and (stream := torch.cuda.current_stream()) not in piece.streams:
            piece.streams.append(stream)  # autograd calls hooks on the stream of the forward pass's kernel
            piece.sent.record_stream(stream)
        gradient.ready = True
        piece.ready += 1
        while self._upcoming and self._upcoming[0].ready == len(self._upcoming[0].gradients):
            piece = self._upcoming.popleft()
            self._receive(UNDER_WAY - 1)
            for stream in piece.streams:
                torch.cuda.current_stream().wait_stream(stream)
            piece.receive = self._send(piece)
            self._under_way.append(piece)

    def _put(self, gradient: _Gradient, value: Tensor | float) -> None:
        """Write this rank's part of a sum where its piece has it."""
        assert gradient.piece.sent is not None
        gradient.piece.sent[gradient.begin : gradient.end] = value

    def _send(self, piece: _Piece) -> Callable[[], Tensor]:
        """Begin to sum a piece over ranks; what is returned waits for the sums of this rank's part."""
        sent = piece.sent
        assert sent is not None
        # Not all to a single one of many ranks, which had to hold and add up what the others send.
        if self._on_cpus and not self._complete and self._ranks * max(piece.parts) <= 2 * piece.size:
            return SumOfParts(sent, piece.parts, self._process_group).wait
        work = dist.all_reduce(sent, group=self._process_group, async_op=True)

        def receive() -> Tensor:
            work.wait()
            return sent if self._complete else sent.split(piece.parts)[dist.get_rank(self._process_group)]

        return receive

    def _receive(self, leave: int = 0) -> None:
        """Wait for the pieces that were sent first, until no more than `leave` are under way, and take their means."""
        while len(self._under_way) > leave:
            piece = self._under_way.popleft()
            assert piece.receive is not None
            if piece.received:
                piece.sums.add_(piece.receive(), alpha=self._scale)
            else:
                torch.mul(piece.receive(), self._scale, out=piece.sums)
            piece.received, piece.sent, piece.receive = True, None, None
            piece.streams.clear()


class OncePerStep(Reduction):
    """Under ZeRO-1, with a BF16_Optimizer: each rank adds up its micro-batches, the sums are exchanged."""

    def __init__(self, engine: Any) -> None:
        """Take the place of what DeepSpeed does after the backward pass.

        Args:
            engine: DeepSpeed's.
        """
        optimizer, complete = engine.optimizer, engine.optimizer._uses_muon
        rank, ranks = dist.get_rank(optimizer.dp_process_group), dist.get_world_size(optimizer.dp_process_group)

        def make_piece(group: int, begin: int, end: int) -> _Piece:
            values = optimizer.fp32_groups_gradients_flat[group]
            bounds = _bounds(begin, end, len(values) // ranks, ranks)
            low, high = (begin, end) if complete else bounds[rank : rank + 2]
            parts = [after - before for before, after in pairwise(bounds)]
            return _Piece(parts, sums=values[low:high], accumulated=values[begin:end])

        super().__init__(engine, optimizer.bf16_groups, make_piece, complete=complete)
        for hook in optimizer._grad_acc_hooks:  # of bf16.immediate_grad_update
            hook.remove()
        # DeepSpeed removes them with the engine.
        optimizer._grad_acc_hooks = [each.register_post_accumulate_grad_hook(self._take) for each in self._gradients]
        optimizer.immediate_grad_update = True  # nothing is left to do after the backward pass
        optimizer.clear_hp_grads = self._forget
        optimizer.get_grads_for_norm = partial(self._for_norm, optimizer.get_grads_for_norm)
        engine.buffered_allreduce_fallback = self._finish
        self._finished = False

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        """Add a parameter's gradient of a micro-batch; that of the last one makes it ready."""
        gradient = self._gradients[parameter]
        assert parameter.grad is not None
        new, parameter.grad = parameter.grad.flatten(), None
        send = self._ranks > 1 and self._engine.is_gradient_accumulation_boundary()
        if gradient.added or not send:
            self._add(gradient, new)
        if send:
            self._make_ready(gradient, gradient.accumulated if gradient.added else new)

    @torch.no_grad()
    def _finish(self, **_: Any) -> None:
        """The means over ranks; called after the last backward pass of a step. A missing gradient counts as zero."""
        for gradient in self._gradients.values():
            if self._ranks == 1 and not gradient.added:
                gradient.accumulated.zero_()
            elif self._ranks > 1 and not gradient.ready:
                self._make_ready(gradient, gradient.accumulated if gradient.added else 0.0)
        self._receive()
        self._finished = True
        self._optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in self._optimizer.bf16_groups]

    def _for_norm(self, original: Callable[[bool], Any], for_clipping: bool = False) -> Any:
        """What DeepSpeed computes norms of, or clips (norms.py)."""
        if not self._finished:
            raise RuntimeError("DeepSpeed took a step without summing gradients over ranks: use version 0.19.8")
        return original(for_clipping)

    def _forget(self) -> None:
        """Begin a step; called after each, whether it was applied or skipped."""
        self._begin_pass()
        self._begin_step()
        self._finished = False


class EachMicroBatch(Reduction):
    """Under ZeRO-2: the gradients of each micro-batch are exchanged, and a rank adds up those of its partition."""

    @staticmethod
    def fits(optimizer: DeepSpeedZeroOptimizer) -> bool:
        """Whether the optimizer keeps fp32 sums of bf16 gradients, of one partition after the other."""
        groups = range(len(optimizer.bit16_groups))
        return (
            optimizer.partition_gradients
            and optimizer.dtype == torch.bfloat16
            and not (optimizer.cpu_offload or optimizer.zenflow or optimizer.round_robin_gradients)
            and optimizer.sequence_parallel_size == 1
            and all(map(optimizer._use_compact_grad_partition_buffer, groups))  # not with Muon
            and not any(padding for group in optimizer.round_robin_bit16_padding for padding in group)
        )

    def __init__(self, engine: Any) -> None:
        """Take the place of what DeepSpeed's hooks do with a gradient, and of what it does after the backward pass.

        Args:
            engine: DeepSpeed's.
        """
        optimizer, groups = engine.optimizer, range(len(engine.optimizer.bit16_groups))
        rank, ranks = dist.get_rank(optimizer.dp_process_group), dist.get_world_size(optimizer.dp_process_group)
        self._partitions = [optimizer._build_compact_grad_partition_buffer(group) for group in groups]

        def make_piece(group: int, begin: int, end: int) -> _Piece:
            values = self._partitions[group].flat_partition
            bounds = _bounds(begin, end, len(values), ranks)
            low, high = (bound - rank * len(values) for bound in bounds[rank : rank + 2])
            parts = [after - before for before, after in pairwise(bounds)]
            sums = values[low:high] if low < high else values[:0]
            return _Piece(parts, sums, accumulated=sums if ranks == 1 else None)

        super().__init__(engine, optimizer.bit16_groups, make_piece)
        optimizer.process_gradients = self._take
        optimizer.independent_gradient_partition_epilogue = self._finish
        self._taken = False  # a gradient of this backward pass

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter, group: int) -> None:
        """Send a parameter's gradient of a micro-batch; a single rank adds it to its sums."""
        assert parameter.grad is not None
        self._taken = True
        new, parameter.grad = parameter.grad.flatten(), None
        if self._ranks > 1:
            self._make_ready(self._gradients[parameter], new)
        else:
            self._add(self._gradients[parameter], new)

    @torch.no_grad()
    def _finish(self) -> None:
        """The means over ranks; called after the backward pass of each micro-batch. A missing gradient is zero."""
        if not self._taken:
            raise RuntimeError("DeepSpeed kept all gradients of a backward pass from lcm-ds: use version 0.19.8")
        self._taken = False
        for gradient in self._gradients.values():
            if self._ranks == 1 and not gradient.added:
                gradient.accumulated.zero_()
                gradient.added = True
            elif self._ranks > 1 and not gradient.ready:
                self._make_ready(gradient, 0.0)
        self._receive()
        self._begin_pass()
        if self._optimizer.is_gradient_accumulation_boundary():
            self._optimizer.averaged_gradients.update(enumerate(self._partitions))  # parameters refer to this dict
            self._begin_step()


class OfPartitioned(Reduction):
    """Under ZeRO-3 on CPUs: as EachMicroBatch, but each rank has a part of every parameter.

    Parameters are gathered in another process group than gradients are sent in, so that the order of both is free.
    """

    @staticmethod
    def fits(engine: Any) -> bool:
        """Whether the optimizer keeps fp32 sums of bf16 gradients, of parameters that all ranks share."""
        optimizer = engine.optimizer
        group = optimizer.dp_process_group
        return (
            optimizer.dtype == torch.bfloat16
            and optimizer.gradient_accumulation_dtype == torch.float32
            and not (optimizer.offload_optimizer or optimizer.zenflow or optimizer.use_muon)
            and optimizer.all2all_process_group is None
            and _over_gloo(group)
            and dist.get_world_size(group) > 1
            and all(_ranks(parameter.ds_process_group) == _ranks(group) for parameter in engine.module.parameters())
        )

    def __init__(self, engine: Any) -> None:
        """Take the place of what DeepSpeed's hooks do with a gradient, and of what it sends after the backward pass.

        Args:
            engine: DeepSpeed's.
        """
        optimizer, ranks = engine.optimizer, dist.get_world_size(engine.optimizer.dp_process_group)
        sizes = [sum(parameter.partition_numel() for parameter in group) for group in optimizer.fp16_groups]
        values = optimizer.grad_partitions_flat_buffer.split(sizes)

        def make_piece(group: int, begin: int, end: int) -> _Piece:
            return _Piece([end - begin] * ranks, sums=values[group][begin:end], accumulated=None)

        super().__init__(engine, optimizer.fp16_groups, make_piece, partitioned=True)
        for bucket in optimizer.ipg_buckets.values():  # of DeepSpeed's own sums, which takes reduce_bucket_size values
            bucket.buffer = None
        optimizer.reduce_ready_partitions_and_remove_grads = self._take
        optimizer.independent_gradient_partition_epilogue = partial(
            self._finish, optimizer.independent_gradient_partition_epilogue
        )

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        """Send a parameter's gradient of a micro-batch."""
        assert parameter.grad is not None
        new, parameter.grad = parameter.grad.flatten(), None
        self._make_ready(self._gradients[parameter], new)

    def _put(self, gradient: _Gradient, value: Tensor | float) -> None:
        """The part of each rank, among the parts of other parameters; beyond the last value there are zeros."""
        assert gradient.piece.sent is not None
        parts = gradient.piece.sent.view(self._ranks, -1)[:, gradient.begin : gradient.end]
        if isinstance(value, Tensor) and len(value) < parts.numel():
            value = torch.nn.functional.pad(value, (0, parts.numel() - len(value)))
        parts[:] = value.view(self._ranks, -1) if isinstance(value, Tensor) else value

    @torch.no_grad()
    def _finish(self, original: Callable[[], None]) -> None:
        """The means over ranks; called after the backward pass of each micro-batch. A missing gradient is zero."""
        for gradient in self._gradients.values():
            if not gradient.ready:
                self._make_ready(gradient, 0.0)
        self._receive()
        self._begin_pass()
        if self._optimizer.is_gradient_accumulation_boundary():
            self._begin_step()
        original()
