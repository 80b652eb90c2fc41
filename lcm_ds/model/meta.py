"""Base-LCM checkpoints of Meta's large_concept_model (fairseq2) as Hugging Face folders."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcm_ds.errors import InputError
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.folder import check_new, write_folder
from lcm_ds.model.modeling import BaseLCM

# Meta's names → ours, prefixes first. In fairseq2's GLU the gate goes through SiLU and inner_proj is what it gates.
RENAMED = (
    (r"^(module\.)?(model\.)?", ""),
    (r"^frontend\.pre_linear\.", "pre_net."),
    (r"^postnet\.fc\.", "post_net."),
    (r"^lcm\.layer_norm\.", "norm."),
    (r"^lcm\.layers\.", "layers."),
    (r"\.self_attn_layer_norm\.", ".input_layernorm."),
    (r"\.ffn_layer_norm\.", ".post_attention_layernorm."),
    (r"\.self_attn\.output_proj\.", ".self_attn.o_proj."),
    (r"\.ffn\.gate_proj\.", ".mlp.gate_proj."),
    (r"\.ffn\.inner_proj\.", ".mlp.up_proj."),
    (r"\.ffn\.output_proj\.", ".mlp.down_proj."),
    # the normaliser sits in both of Meta's ends, the same twice
    (r"^(frontend|postnet)\.(scaler|normalizer)\.center$", "normalizer.center"),
    (r"^(frontend|postnet)\.(scaler|normalizer)\.scale$", "normalizer.scale"),
)
HEAD_DIM = 128  # of Meta's models: 2048 wide with 16 heads


def import_meta(checkpoint: str | Path, output: str | Path, heads: int | None = None) -> BaseLCM:
    """Write Meta's checkpoint (a .pt `{"model": state_dict}`, or .safetensors) as a Hugging Face folder.

    heads: attention heads, which the weights do not tell; by default what the file's header says, else 128 dimensions
    a head. Without a normaliser in the file the model's is the identity. Raises InputError for a file that is not such
    a checkpoint.
    """
    check_new(output)
    weights, header = read_checkpoint(Path(checkpoint))
    renamed = {rename(name): tensor.float() for name, tensor in weights.items()}
    config = _config_of(renamed, header, heads, checkpoint)
    with torch.device("meta"):
        model = BaseLCM(config)
    model = model.to_empty(device="cpu")
    for name in ("center", "scale"):
        identity = torch.full((config.embed_dim,), float(name == "scale"))
        renamed.setdefault(f"normalizer.{name}", identity)
    expected = model.state_dict()
    mistakes = [f"{checkpoint}: {name} is missing" for name in expected.keys() - renamed.keys()]
    mistakes += [f"{checkpoint}: {name}: unknown to Base-LCM" for name in renamed.keys() - expected.keys()]
    mistakes += [
        f"{checkpoint}: {name} has shape {list(tensor.shape)}, {list(expected[name].shape)} fits the others"
        for name, tensor in renamed.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if mistakes:
        raise InputError(sorted(mistakes))
    model.load_state_dict(renamed)
    write_folder(model, output)
    return model.eval()


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights under Meta's names, and what a safetensors header says about them."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = file.keys()
                # a file may hold more than the weights, which then stand under "model."
                chosen = [name for name in names if name.startswith("model.")] or list(names)
                return {name: file.get_tensor(name) for name in chosen}, file.metadata() or {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    weights: Any = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f'{path}: has to be {{"model": state_dict}}, as Meta\'s trainer writes it')
    return weights, {}


def rename(name: str) -> str:
    """Meta's name of a weight in ours."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _config_of(weights: dict[str, Tensor], header: dict[str, str], heads: int | None, origin: Any) -> BaseLCMConfig:
    """Sizes read off the weights' shapes."""
    for name in ("pre_net.weight", "layers.0.mlp.gate_proj.weight"):
        if name not in weights or weights[name].ndim != 2:
            raise InputError(f"{origin}: no Base-LCM in here: {name} is missing (Meta's name may differ)")
    hidden_size, embed_dim = weights["pre_net.weight"].shape
    if heads is None and "num_heads" in header:
        heads = int(header["num_heads"])
    if heads is None and hidden_size % HEAD_DIM == 0:
        heads = hidden_size // HEAD_DIM
    if heads is None or heads < 1 or hidden_size % (2 * heads):
        raise InputError(f"{origin}: --heads {heads}: has to divide the width {hidden_size} into even parts")
    layers = {int(match[1]) for match in map(re.compile(r"layers\.(\d+)\.").match, weights) if match}
    return BaseLCMConfig(
        embed_dim=embed_dim,
        hidden_size=hidden_size,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=heads,
        intermediate_size=weights["layers.0.mlp.gate_proj.weight"].shape[0],
        rms_norm_eps=float(header.get("norm_eps", 1e-5)),
        rope_theta=float(header.get("rope_theta", 10_000.0)),
    )
