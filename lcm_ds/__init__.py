"""lcm-ds: distributed training of Large Concept Models on DeepSpeed."""

import importlib.abc
import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcm_ds.model.modeling import BaseLCM as BaseLCM

__version__ = "0.1.0"

# DeepSpeed warns whenever it finds no GPU, as it is imported; a run says in its first line what it runs on.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


class _WithoutMlflow(importlib.abc.MetaPathFinder):
    """Keeps DeepSpeed's autotuner, which lcm-ds does not use, from importing mlflow: a fifth of a rank's start."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise ModuleNotFoundError for mlflow while the autotuner is being imported; it goes on without."""
        autotuner = sys.modules.get("deepspeed.autotuning.autotuner")
        if name == "mlflow" and getattr(getattr(autotuner, "__spec__", None), "_initializing", False):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _WithoutMlflow())


def __getattr__(name: str) -> Any:
    """`from lcm_ds import BaseLCM`, without importing torch and transformers for those who do not ask for it."""
    if name == "BaseLCM":
        from lcm_ds.model.modeling import BaseLCM

        return BaseLCM
    raise AttributeError(f"module 'lcm_ds' has no attribute {name!r}")
