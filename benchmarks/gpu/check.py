"""Whether kernels on a GPU compute what they should: a row for each check; exits with 1 if one is wrong.

python benchmarks/gpu/check.py

Attention and its gradients are compared with fp64, dropout and noise with the CPU's, loss and gradients of a model in
bf16 with those in fp32 on the CPU. Without a GPU all of it runs on the CPU, with small sizes.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lcm_ds.data.batch import target_mask
from lcm_ds.model.attention import SegmentLayout, attend, varlen_takes
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.counter_rng import DropoutDraws, drop
from lcm_ds.model.fused import enable_fusion
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.train.loss import input_noise, row_keys, squared_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
LENGTH, SEGMENT = (1024, 128) if ON_GPU else (48, 16)  # of a row, and of its longest segment
DIMS = 1024 if ON_GPU else 32  # of a concept
# In bf16, whose rounding is 4e-3; far above it something else is wrong.
MAX_ATTENTION_ERROR, MAX_LOSS_ERROR, MAX_GRADIENT_ERROR = 1e-2, 5e-3, 5e-2
MAX_NOISE_ERROR = 1e-4  # functions like the logarithm round otherwise on a GPU


class Check(NamedTuple):
    """A row of the table."""

    name: str
    right: bool
    figures: str


def main() -> int:
    """Make all checks; one that raises is wrong, too."""
    wrong = 0
    print("| check | result | figures |\n| --- | --- | --- |")
    for check in (attention, dropout, noise, model):
        try:
            for made in check():
                wrong += not made.right
                print(f"| {made.name} | {'ok' if made.right else 'WRONG'} | {made.figures} |", flush=True)
        except Exception as error:
            traceback.print_exc()
            wrong += 1
            print(f"| {check.__name__} | WRONG | {type(error).__name__}: {str(error).splitlines()[:1]} |", flush=True)
    return 1 if wrong else 0


def attention() -> Iterator[Check]:
    """Outputs and gradients of packed rows, with segments of several lengths and rows that end in padding."""
    shapes = ((16, 128, SEGMENT, torch.bfloat16), (8, 64, SEGMENT, torch.float16), (4, 64, 3, torch.bfloat16))
    for heads, head_dim, longest, dtype in shapes:
        ids = segments(3, longest)
        layout = SegmentLayout.from_ids(ids, longest).prepared(DEVICE, dtype, head_dim)
        inputs = [torch.randn(*ids.shape, heads, head_dim, device=DEVICE, dtype=dtype) for _ in "qkv"]
        weights = torch.randn_like(inputs[0])
        found, exact = (
            with_gradients(function, [each.detach().to(kind).requires_grad_() for each in inputs], weights.to(kind))
            for function, kind in (
                (lambda *qkv, layout=layout: attend(*qkv, layout), dtype),
                (lambda *qkv, layout=layout: exact_attention(*qkv, layout), torch.float64),
            )
        )
        real = (ids >= 0).to(DEVICE)
        errors = [distance(one[real], other[real]) for one, other in zip(found, exact, strict=True)]
        wants_flash = ON_GPU and torch.cuda.get_device_capability() >= (8, 0) and varlen_takes(dtype, head_dim)
        name = f"attention, {heads} x {head_dim}, segments to {longest}, {str(dtype).removeprefix('torch.')}"
        finite = all(each[real].isfinite().all() for each in found)
        right = max(errors) < MAX_ATTENTION_ERROR and layout.varlen == wants_flash and finite
        figures = ", ".join(f"{error:.1e}" for error in errors)
        yield Check(name, right, f"errors {figures}; {'flash' if layout.varlen else 'SDPA'}")


def exact_attention(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout) -> Tensor:
    """Softmax over the earlier concepts of the segment, written out: [rows, row_length, heads, head_dim]."""
    index = torch.arange(query.shape[1], device=query.device)
    starts = index - layout.positions.to(query.device)
    seen = (index <= index[:, None]) & (index >= starts[:, :, None])
    scores = torch.einsum("rqhd,rkhd->rhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("rhqk,rkhd->rqhd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), value)


def dropout() -> Iterator[Check]:
    """The same values are dropped as on a CPU, eager and compiled."""
    values, keys = torch.ones(2, LENGTH, 256), torch.tensor([3, 4])

    def dropped(values: Tensor, keys: Tensor) -> Tensor:
        return drop(values, DropoutDraws.of(keys, 6, LENGTH, 256, 0.1).at(5))

    expected = dropped(values, keys)
    for name, function in (("eager", dropped), ("compiled", torch.compile(dropped))):
        found = function(values.to(DEVICE), keys.to(DEVICE)).cpu()
        same = torch.equal(found == 0, expected == 0) and torch.allclose(found, expected)
        yield Check(f"dropout, {name}", same, f"{float((found == 0).float().mean()):.4f} of values dropped")


def noise() -> Iterator[Check]:
    """A row's noise is that of the CPU and does not depend on the rows beside it."""

    def drawn(rows: int, device: torch.device, first_lane: int = 0) -> Tensor:
        keys = row_keys("noise", rows, seed=1, step=3, first_lane=first_lane).to(device)
        made = input_noise(torch.zeros(rows, LENGTH, DIMS, device=device), 1.0, keys)
        assert made is not None
        return made.cpu()

    found, alone = drawn(2, DEVICE), drawn(1, DEVICE, first_lane=1)
    same, deviation = torch.equal(found[1], alone[0]), float(found.std())
    yield Check("noise of a row in another batch", same, f"standard deviation {deviation:.4f}")
    expected = drawn(2, torch.device("cpu"))
    for name, fused in (("eager", False), ("fused", True)):
        enable_fusion(fused)
        error = distance(drawn(2, DEVICE), expected)
        yield Check(f"noise, {name}", error < MAX_NOISE_ERROR, f"error {error:.1e} to the CPU's; 1.4: another draw")
    enable_fusion(False)


def model() -> Iterator[Check]:
    """Loss and gradients in bf16: eager, with fused functions, and compiled; on a GPU in both kinds of attention."""
    for kind in ("document", "row") if ON_GPU else ("row",):
        exact = loss_and_gradient(fresh(kind), torch.device("cpu"), torch.float32, kind)
        for way in ("eager", "fused", "compiled"):
            made = fresh(kind)
            enable_fusion(way != "eager")
            if way == "compiled":
                made.compile_layers()
            started = time.perf_counter()
            found = loss_and_gradient(made, DEVICE, torch.bfloat16, kind)
            errors = [distance(one, other) for one, other in zip(found, exact, strict=True)]
            yield Check(
                f"model, attention: {kind}, {way}",
                errors[0] < MAX_LOSS_ERROR and errors[1] < MAX_GRADIENT_ERROR,
                f"loss {errors[0]:.1e}, gradient {errors[1]:.1e}; {time.perf_counter() - started:.0f} s",
            )
            enable_fusion(False)


def fresh(attention: str) -> BaseLCM:
    """A model with dropout and the same weights each time."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 2816, "num_hidden_layers": 4}
    small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2}
    config = BaseLCMConfig(embed_dim=DIMS, dropout=0.1, attention=attention, **(sizes if ON_GPU else small))
    return BaseLCM(config).initialize(0).train()


def loss_and_gradient(made: BaseLCM, device: torch.device, dtype: torch.dtype, attention: str) -> tuple[Tensor, Tensor]:
    """The loss, and the gradients of all parameters as one vector, in fp64 on the CPU.

    Args:
        made: Of `fresh`; moved to the device and cast.
        device: To compute on.
        dtype: Of parameters and activations.
        attention: "document" or "row".
    """
    made = made.to(device, dtype)
    ids = segments(4, SEGMENT)
    concepts = torch.randn(*ids.shape, DIMS, generator=torch.Generator().manual_seed(1)).to(device)
    mask = target_mask(ids)
    layout = SegmentLayout.from_ids(ids, SEGMENT, attention)
    predictions = made(concepts, layout, dropout_keys=torch.arange(4, device=device))
    loss = squared_error(predictions, made.normalizer.normalize(concepts[:, 1:]), mask.to(device)) / int(mask.sum())
    loss.backward()
    gradients = [
        parameter.grad.flatten().double().cpu() for parameter in made.parameters() if parameter.grad is not None
    ]
    return loss.detach().double().cpu(), torch.cat(gradients)


def segments(rows: int, longest: int) -> Tensor:
    """Segment ids, int32 [rows, LENGTH]: segments of 1 to `longest`; every other row ends in padding."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.full((rows, LENGTH), -1, dtype=torch.int32)
    for number, row in enumerate(ids):
        end = LENGTH - LENGTH // 9 if number % 2 else LENGTH
        start = segment = 0
        while start < end:
            stop = min(end, start + int(torch.randint(1, longest + 1, (1,), generator=generator)))
            row[start:stop] = segment
            start, segment = stop, segment + 1
    return ids


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of its weighted sum.

    Args:
        function: Of the inputs.
        inputs: Leaves that require gradients.
        weights: Of the sum; like the output.
    """
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


if __name__ == "__main__":
    sys.exit(main())
