"""`lcm_ds.BaseLCM`: a Base-LCM as transformers knows it, which reads and writes folders of Hugging Face.

Apart from the model itself, so that ranks that train do not import transformers, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lcm_ds.model import modeling
from lcm_ds.model.config import BaseLCMConfig


class BaseLCM(modeling.BaseLCM, PreTrainedModel):  # type: ignore[misc]
    """The same model; config.json names this class."""

    config_class = BaseLCMConfig
    base_model_prefix = "base_lcm"
    main_input_name = "concepts"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (Hugging Face's own declaration)
    _keep_in_fp32_modules_strict = ["normalizer"]  # noqa: RUF012

    from_pretrained: Any = classmethod(PreTrainedModel.from_pretrained.__func__)  # type: ignore[attr-defined]
    save_pretrained: Any = PreTrainedModel.save_pretrained

    def __init__(self, config: BaseLCMConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self._build(config)
        self.post_init()

    @classmethod
    def of(cls, model: modeling.BaseLCM) -> BaseLCM:
        """A model of this class with the tensors of another."""
        with torch.device("meta"):
            own = cls(BaseLCMConfig(**model.config.sizes()))
        own.load_state_dict(model.state_dict(), assign=True)
        return own
