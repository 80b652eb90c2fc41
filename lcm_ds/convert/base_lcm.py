"""Base-LCM checkpoints of Meta's large_concept_model (fairseq2) as Hugging Face folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_ds.convert.fairseq2 import check_names, number_in, read_checkpoint
from lcm_ds.errors import InputError
from lcm_ds.files import check_new
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.pretrained import write_folder

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
    # Meta applies it outside of the model's forward pass, and keeps it in the frontend
    (r"^frontend\.sonar_normalizer\.", "normalizer."),
)
HEAD_DIM = 128  # of Meta's models: 2048 wide with 16 heads


def import_meta(checkpoint: str | Path, output: str | Path, heads: int | None = None) -> BaseLCM:
    """Write Meta's checkpoint (a .pt `{"model": state_dict}`, or .safetensors) as a Hugging Face folder.

    Without a normaliser in the file the model's is the identity. Raises InputError as `read_meta`, and where the folder
    is there already.
    """
    check_new(output)
    config, weights = read_meta(checkpoint, heads)
    with torch.device("meta"):
        model = BaseLCM(config)
    model = model.to_empty(device="cpu")
    if "normalizer.center" not in weights:
        weights["normalizer.center"] = torch.zeros(config.embed_dim)
        weights["normalizer.scale"] = torch.ones(config.embed_dim)
    model.load_state_dict(weights)
    write_folder(model, output)
    return model.eval()


def read_meta(checkpoint: str | Path, heads: int | None = None) -> tuple[BaseLCMConfig, dict[str, Tensor]]:
    """The sizes of the model in Meta's checkpoint, and its weights under our names, fp32.

    heads: attention heads, which the weights do not tell; by default what the file's header says, else 128 dimensions
    a head. The normaliser is among the weights where the file has one. Raises InputError for a file that is not such a
    checkpoint, and for one of a model that computes something else (a normaliser that clips, weight normalisation).
    """
    weights, header = read_checkpoint(Path(checkpoint))
    renamed = {rename(name): tensor.float() for name, tensor in weights.items()}
    config = _config_of(renamed, header, heads, checkpoint)
    with torch.device("meta"):
        expected = BaseLCM(config).state_dict()
    if not any(name.startswith("normalizer.") for name in renamed):
        expected = {name: value for name, value in expected.items() if not name.startswith("normalizer.")}
    check_names(expected, renamed, checkpoint, "Base-LCM")
    return config, renamed


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
    heads = number_in(header, "num_heads", int, heads, origin) if heads is None else heads
    if heads is None and hidden_size % HEAD_DIM == 0:
        heads = hidden_size // HEAD_DIM
    if heads is None:
        raise InputError(f"{origin}: --heads: the weights do not tell how many attention heads share {hidden_size}")
    if heads < 1 or hidden_size % (2 * heads):
        raise InputError(f"{origin}: --heads {heads}: has to divide the width {hidden_size} into even parts")
    layers = {int(match[1]) for match in map(re.compile(r"layers\.(\d+)\.").match, weights) if match}
    return BaseLCMConfig(
        embed_dim=embed_dim,
        hidden_size=hidden_size,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=heads,
        intermediate_size=weights["layers.0.mlp.gate_proj.weight"].shape[0],
        rms_norm_eps=number_in(header, "norm_eps", float, 1e-5, origin),
        rope_theta=number_in(header, "rope_theta", float, 10_000.0, origin),
    )
