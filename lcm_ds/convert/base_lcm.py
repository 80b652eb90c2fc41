"""Base-LCM checkpoints of Meta's large_concept_model (fairseq2) as Hugging Face folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_ds.convert.fairseq2 import attention_heads, check_names, header_number, layer_count, read_checkpoint
from lcm_ds.errors import InputError
from lcm_ds.files import check_new
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.pretrained import write_folder
from lcm_ds.model.sizes import ModelSizes

# Meta's names → ours, prefixes first. In fairseq2's GLU, SiLU(gate_proj) gates inner_proj.
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
    # Meta applies it outside of the model's forward pass
    (r"^frontend\.sonar_normalizer\.", "normalizer."),
)
HEAD_DIM = 128  # of Meta's models: 2048 wide with 16 heads


def import_meta(checkpoint: str | Path, output: str | Path, heads: int | None = None) -> BaseLCM:
    """Write Meta's checkpoint as a Hugging Face folder; without a normaliser in the file, with the identity.

    Args:
        checkpoint: A .pt with `{"model": state_dict}`, or .safetensors.
        output: A new or empty folder.
        heads: See `read_meta`.

    Raises:
        InputError: As `read_meta`, and if the folder exists already.
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


def read_meta(checkpoint: str | Path, heads: int | None = None) -> tuple[ModelSizes, dict[str, Tensor]]:
    """The sizes of the model in Meta's checkpoint, and its weights under our names, fp32, with the normaliser if any.

    heads: number of attention heads, which the weights do not determine; default: that in the file's header, else one
    for 128 dimensions. Raises InputError for any other file, and for other models (e.g. with a clipping normaliser or
    weight normalisation).
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


def _config_of(weights: dict[str, Tensor], header: dict[str, str], heads: int | None, origin: Any) -> ModelSizes:
    """Sizes, from the shapes of the weights."""
    for name in ("pre_net.weight", "layers.0.mlp.gate_proj.weight"):
        if name not in weights or weights[name].ndim != 2:
            raise InputError(f"{origin}: not a Base-LCM: {name} is missing (Meta's name may differ)")
    hidden_size, embed_dim = weights["pre_net.weight"].shape
    heads = attention_heads(heads, header, "num_heads", hidden_size, HEAD_DIM, origin)
    if heads < 1 or hidden_size % (2 * heads):
        raise InputError(f"{origin}: --heads {heads}: has to divide the hidden size {hidden_size} into even parts")
    return ModelSizes(
        embed_dim=embed_dim,
        hidden_size=hidden_size,
        num_hidden_layers=layer_count(weights),
        num_attention_heads=heads,
        intermediate_size=weights["layers.0.mlp.gate_proj.weight"].shape[0],
        rms_norm_eps=header_number(header, "norm_eps", float, 1e-5, origin),
        rope_theta=header_number(header, "rope_theta", float, 10_000.0, origin),
    )
