"""lcm-ds: distributed training of Large Concept Models on DeepSpeed."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcm_ds.model.modeling import BaseLCM as BaseLCM

__version__ = "0.1.0"

# DeepSpeed warns whenever it finds no GPU, as it is imported; a run says in its first line what it runs on.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def __getattr__(name: str) -> Any:
    """`from lcm_ds import BaseLCM`, without importing torch and transformers for those who do not ask for it."""
    if name == "BaseLCM":
        from lcm_ds.model.modeling import BaseLCM

        return BaseLCM
    raise AttributeError(f"module 'lcm_ds' has no attribute {name!r}")
