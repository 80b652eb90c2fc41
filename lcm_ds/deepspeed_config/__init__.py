"""DeepSpeed JSON: validated, and every "auto" filled in from the run's config."""

from lcm_ds.deepspeed_config.device import check_device
from lcm_ds.deepspeed_config.resolver import (
    accumulation_steps,
    check,
    find,
    layout,
    offloads_optimizer,
    offloads_to_nvme,
    precision,
    read,
    resolve,
    shuffles_parameters,
    without_owned,
    zero_stage,
)

__all__ = [
    "accumulation_steps",
    "check",
    "check_device",
    "find",
    "layout",
    "offloads_optimizer",
    "offloads_to_nvme",
    "precision",
    "read",
    "resolve",
    "shuffles_parameters",
    "without_owned",
    "zero_stage",
]
