"""Layers that read the same input give what each gives alone, wherever their weights lie."""

import pytest
import torch
from tolerance import rounding
from torch import nn

import lcm_ds.model.linear as module
from lcm_ds.model.linear import joined, project


def layers(dtype, side_by_side):
    made = [nn.Linear(8, rows).to(dtype) for rows in (6, 6, 10)]
    if side_by_side:  # as ZeRO 1 and 2 lay parameters
        for name in ("weight", "bias"):
            flat = torch.cat([getattr(layer, name).detach().flatten() for layer in made])
            for layer, part in zip(made, flat.split([getattr(layer, name).numel() for layer in made]), strict=True):
                getattr(layer, name).data = part.view(getattr(layer, name).shape)
    return made


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_layers_one_by_one(dtype, side_by_side, compiled):
    made = layers(dtype, side_by_side)
    x = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    weights = [torch.randn(2, 5, layer.out_features, dtype=dtype) for layer in made]
    inputs = [x, *(parameter for layer in made for parameter in layer.parameters())]
    call = torch.compile(project, fullgraph=True) if compiled else project
    results = []
    for outputs in (call(x, *made), [layer(x) for layer in made]):
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_weights_side_by_side_are_not_copied():
    weights = [layer.weight.detach() for layer in layers(torch.float32, side_by_side=True)]
    whole = joined(weights)
    assert whole.data_ptr() == weights[0].data_ptr()
    assert torch.equal(whole, torch.cat(weights))
    apart = [layer.weight.detach() for layer in layers(torch.float32, side_by_side=False)]
    assert torch.equal(joined(apart), torch.cat(apart))


def test_an_input_that_needs_no_gradient_gets_none():
    (layer,) = layers(torch.float32, side_by_side=False)[:1]
    (y,) = project(torch.ones(3, 8), layer)
    y.sum().backward()
    assert torch.allclose(layer.weight.grad, torch.full((6, 8), 3.0))
    assert torch.allclose(layer.bias.grad, torch.full((6,), 3.0))


@pytest.mark.skipif(not module.by_onednn(torch.empty(0)), reason="this build of torch has no product of oneDNN")
def test_second_derivatives_are_refused_instead_of_wrong():
    x = torch.randn(4, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(project(x, nn.Linear(6, 5))[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_no_weights_are_put_together_for_few_inputs_that_need_no_gradient(monkeypatch):
    made, together = layers(torch.float32, side_by_side=False), []
    monkeypatch.setattr(module, "joined", lambda tensors: together.append(len(tensors)) or joined(tensors))
    for rows in (3, module.FEW):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            outputs = project(x, *made)
        for output, layer in zip(outputs, made, strict=True):
            assert torch.allclose(output, layer(x), atol=rounding(8 + 1, size=3))  # eight products and the bias
        assert max(together, default=1) == (1 if rows < module.FEW else 3)
