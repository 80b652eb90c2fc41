"""A transformer's forward pass on a CPU by OpenVINO, which is faster there than PyTorch's."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from lcm_ds.errors import InputError, first_line
from lcm_ds.terminal import silence_transformers

# dtype → OpenVINO's names of the precision and of the CPU's capability
_NAMES = {torch.float32: ("f32", "FP32"), torch.bfloat16: ("bf16", "BF16")}


def openvino_is_installed() -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec("openvino") is not None


class OpenVINOTransformer:
    """The last hidden states of a model of transformers, computed by OpenVINO with torch's number of threads.

    Args:
        model: With its weights in float32, on the CPU; it is traced, and not kept.
        dtype: Of the matrix products: float32 or bfloat16.

    Raises:
        InputError: OpenVINO is not installed, or does not compute in this type on this CPU; the weights are not in
            float32.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        # Imported, openvino sends an event to an analytics service, unless this package is missing.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            import openvino
            from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
        except ImportError as error:
            reason = f" ({first_line(error)})" if openvino_is_installed() else ""
            raise InputError(f"encoder.backend: openvino needs: pip install 'lcm-ds[openvino]'{reason}") from None
        core = openvino.Core()
        precision, capability = _NAMES.get(dtype, ("", ""))
        if capability not in ("FP32", *core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
            # It would compute in float32, without a word.
            name = str(dtype).removeprefix("torch.")
            raise InputError(f"encoder.dtype: openvino does not compute in {name} on this CPU")
        if any(each.dtype != torch.float32 for each in model.parameters()):
            raise InputError("encoder.backend: openvino converts weights in float32, the model's are not: use torch")
        ids = torch.ones(2, 8, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # padding, or the trace would hold only what is done without
        frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
        with warnings.catch_warnings(), silence_transformers():
            warnings.simplefilter("ignore")  # of the trace: what depends on the example is found by comparing
            traced = TorchScriptPythonDecoder(_HiddenStates(model), example_input=(ids, mask))
        # Not pinned: on one machine several processes encode, and each would be pinned to the first cores.
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        graph = frontend.convert(frontend.load(traced))
        self._request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states, float32 [n, length, width], of int64 [n, length] and its mask, 1 for tokens."""
        found = self._request.infer([input_ids.numpy(), attention_mask.numpy()], share_inputs=True)
        return torch.from_numpy(found[0].astype("float32", copy=True))


class _HiddenStates(torch.nn.Module):
    """A model without all that it returns beside the hidden states."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
