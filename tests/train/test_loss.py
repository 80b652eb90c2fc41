"""The loss counts targets only, and the noise belongs to a lane, not to a device."""

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_ds.data.batch import target_mask
from lcm_ds.model.normalizer import Normalizer
from lcm_ds.train.loss import input_noise, row_keys, squared_error


def test_the_first_concept_of_a_segment_and_padding_are_not_targets():
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1]])
    assert target_mask(ids).tolist() == [[True, True, False, False, True, False, False]]


def test_squared_error_by_hand():
    targets = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    predictions = torch.tensor([[[1.0, 1.0], [9.0, 9.0], [7.0, 7.0]]])
    only_first = torch.tensor([[True, False]])
    # ((1 - 1)² + (1 - 3)²) / 2
    assert squared_error(predictions, targets, only_first).item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_those_of_the_formula(dtype):
    predictions = torch.randn(3, 9, 64).to(dtype).requires_grad_()
    targets, mask = torch.randn(3, 8, 64), torch.rand(3, 8) < 0.7
    # a scale as fp16 training has it: the gradient of a sum over 10 targets at 2**16
    scale = 2.0**16 / 10
    difference = predictions[:, :-1].float() - targets
    plain = (difference.square().mean(dim=-1) * mask).sum()
    (expected,) = torch.autograd.grad(plain * scale, predictions)
    error = squared_error(predictions, targets.clone(), mask)
    (found,) = torch.autograd.grad(error * scale, predictions)
    assert error.item() == pytest.approx(plain.item(), rel=1e-6)
    assert found.dtype == dtype
    assert torch.allclose(found, expected, rtol=1e-6 if dtype is torch.float32 else 1e-3, atol=0)


def test_a_step_holds_one_fp32_tensor_of_the_size_of_the_targets():
    predictions = torch.randn(2, 65, 512, dtype=torch.bfloat16, requires_grad=True)
    raw, mask = torch.randn(2, 65, 512, dtype=torch.float16), torch.ones(2, 64, dtype=torch.bool)
    normalizer = Normalizer(512)

    class Large(TorchDispatchMode):
        made: ClassVar[set[int]] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.dtype == torch.float32
                    and tensor.numel() >= 2 * 64 * 512
                ):
                    self.made.add(tensor.data_ptr())
            return out

    with Large() as large:
        squared_error(predictions, normalizer.normalize(raw[:, 1:]), mask).backward()
    assert len(large.made) == 1


def test_concepts_that_are_not_targets_have_no_gradient():
    predictions = torch.randn(1, 4, 3, requires_grad=True)
    ids = torch.tensor([[0, 0, -1, -1]])
    squared_error(predictions, torch.randn(1, 3, 3), target_mask(ids)).backward()
    assert predictions.grad is not None
    assert predictions.grad[0, 0].abs().sum() > 0
    assert predictions.grad[0, 1:].abs().sum() == 0


def test_noise_of_a_lane_is_the_same_in_any_micro_batch():
    noise = input_noise(torch.empty(4, 8, 16), 0.05, row_keys("noise", 4, seed=3, step=7, first_lane=0))
    part = input_noise(torch.empty(2, 8, 16), 0.05, row_keys("noise", 2, seed=3, step=7, first_lane=2))
    assert noise is not None
    assert part is not None
    assert torch.equal(noise[2:], part)
    assert not torch.equal(noise[0], noise[1])
    assert abs(noise.std().item() - 0.05) < 0.01


def test_keys_change_with_purpose_step_and_seed():
    changes = (("noise", 1, 1), ("noise", 1, 2), ("noise", 2, 1), ("dropout", 1, 1))
    assert len({int(row_keys(purpose, 1, seed, step, 0)) for purpose, seed, step in changes}) == 4


def test_no_noise_without_a_standard_deviation():
    assert input_noise(torch.empty(1, 2, 2), 0.0, torch.tensor([1])) is None
