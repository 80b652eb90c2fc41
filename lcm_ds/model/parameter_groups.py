"""Which parameters the optimizer holds together, in an order that a checkpoint's readers know, too."""

from __future__ import annotations

from typing import Any

from lcm_ds.config import OptimConfig
from lcm_ds.model.modeling import BaseLCM


def parameter_groups(model: BaseLCM, optim: OptimConfig, optimizer: str) -> list[dict[str, Any]]:
    """The parameters as the optimizer holds them: weight decay on matrices only, not on biases and RMSNorm scales.

    Muon takes the decoder's matrices; all else of it is AdamW's. DeepSpeed itself would take pre-net and post-net, the
    ends where concepts come in and go out, for the decoder's.
    """
    inside = {id(parameter) for layer in model.layers for parameter in layer.parameters()}
    muon = optimizer.lower() == "muon"
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}  # by whether they are matrices, and Muon's
    for decay, by_muon in ((True, True), (True, False), (False, False)):
        groups[decay, by_muon] = {"params": [], "weight_decay": optim.weight_decay if decay else 0.0}
        if muon:
            groups[decay, by_muon]["use_muon"] = by_muon
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        # Under ZeRO-3 a parameter's own shape is that of its partition; ds_shape is the whole one.
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        groups[matrix, muon and matrix and id(parameter) in inside]["params"].append(parameter)
    # DeepSpeed's Muon sorts them so; done here, the order is known to those who read a checkpoint.
    groups[True, True]["params"].sort(key=lambda parameter: parameter.size(), reverse=True)
    return [group for group in groups.values() if group["params"]]
