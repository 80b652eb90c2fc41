"""lcm-ds: distributed training of Large Concept Models on DeepSpeed."""

import importlib.abc
import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcm_ds.model.hugging_face import BaseLCM as BaseLCM

__version__ = "0.1.0"

# DeepSpeed warns whenever it finds no GPU, as it is imported; a run says in its first line what it runs on.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


class _WithoutUnused(importlib.abc.MetaPathFinder):
    """Keeps libraries from importing packages that lcm-ds does not need, which takes seconds at a rank's start.

    These are mlflow, which DeepSpeed's autotuner imports, and torchao, which transformers' quantizers import.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise ModuleNotFoundError for mlflow while the autotuner is being imported; it works without it.

        Before transformers imports its quantizer for torchao, have it conclude, for this process, that there is none.
        """
        if name == "transformers.quantizers.quantizer_torchao" and "torchao" not in sys.modules:
            sys.modules["torchao"] = None  # type: ignore[assignment]
            try:
                getattr(sys.modules.get("transformers.utils"), "is_torchao_available", bool)()
            finally:
                del sys.modules["torchao"]
        autotuner = sys.modules.get("deepspeed.autotuning.autotuner")
        if name == "mlflow" and getattr(getattr(autotuner, "__spec__", None), "_initializing", False):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _WithoutUnused())


def __getattr__(name: str) -> Any:
    """`from lcm_ds import BaseLCM`, without importing torch and transformers for those who do not ask for it."""
    if name == "BaseLCM":
        from lcm_ds.model.hugging_face import BaseLCM

        return BaseLCM
    raise AttributeError(f"module 'lcm_ds' has no attribute {name!r}")
