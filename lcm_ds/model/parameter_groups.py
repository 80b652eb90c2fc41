"""The optimizer's parameter groups, in an order that readers of a checkpoint can rebuild."""

from __future__ import annotations

from typing import Any

from lcm_ds.config import OptimConfig
from lcm_ds.model.modeling import BaseLCM


def parameter_groups(model: BaseLCM, optim: OptimConfig, optimizer: str) -> list[dict[str, Any]]:
    """The parameters by group: weight decay on matrices only, not on biases and RMSNorm scales.

    Muon updates the decoder's matrices, AdamW the rest. DeepSpeed's own choice would count pre-net and post-net among
    the decoder's.
    """
    inside = {id(parameter) for layer in model.layers for parameter in layer.parameters()}
    muon = optimizer.lower() == "muon"
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}  # by whether they are matrices, and Muon's
    for decay, by_muon in ((True, True), (True, False), (False, False)):
        groups[decay, by_muon] = {"params": [], "weight_decay": optim.weight_decay if decay else 0.0}
        if muon:
            groups[decay, by_muon]["use_muon"] = by_muon
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        # Under ZeRO-3 a parameter's own shape is that of its partition; ds_shape is the full one.
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        groups[matrix, muon and matrix and id(parameter) in inside]["params"].append(parameter)
    # As DeepSpeed's Muon sorts them, so that readers of a checkpoint know the order.
    groups[True, True]["params"].sort(key=lambda parameter: parameter.size(), reverse=True)
    return [group for group in groups.values() if group["params"]]
