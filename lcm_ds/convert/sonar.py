"""SONAR's text encoder and decoder: from Meta's fairseq2 checkpoints to folders that our encoder and decoder load.

Outputs agree to rounding: transformers and fairseq2 differ in names and in the order of the first four tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_ds.convert.fairseq2 import attention_heads, check_names, header_number, layer_count, read_checkpoint
from lcm_ds.encoders.base import unreachable
from lcm_ds.encoders.sonar import nllb_languages, tokenizer_of_pieces
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import check_new, new_folder
from lcm_ds.hub import work_offline_without
from lcm_ds.terminal import silence_transformers

# fairseq2's names → transformers', within the encoder or the decoder
RENAMED = (
    (r"^(encoder|decoder)\.", ""),
    (r"^(encoder|decoder)_frontend\.embed\.", "embed_tokens."),
    (r"\.ffn\.inner_proj\.", ".fc1."),
    (r"\.ffn\.output_proj\.", ".fc2."),
    (r"\.ffn_layer_norm\.", ".final_layer_norm."),
    (r"\.encoder_decoder_attn", ".encoder_attn"),
    (r"\.output_proj\.", ".out_proj."),
)
# fairseq2 counts <pad> <unk> <s> </s>, transformers <s> <pad> </s> <unk>.
TOKEN_ORDER = (2, 0, 3, 1)
HEAD_DIM = 64  # of Meta's SONAR: 1024 wide with 16 heads
MAX_TOKENS = 512  # in Meta's training
# fairseq2's vocabulary: the pieces of sentencepiece, the languages, and three tokens for the origin of data.
EXTRA_TOKENS = 3
TOKENIZER = "facebook/nllb-200-distilled-600M"  # its vocabulary is SONAR's

CARD = """\
---
license: cc-by-nc-4.0
---

SONAR's text {part} (https://arxiv.org/abs/2308.11466), imported by lcm-ds from Meta's checkpoint `{checkpoint}`. Meta's
SONAR weights are licensed CC-BY-NC-4.0 (non-commercial).
"""


def import_sonar(
    encoder: str | Path,
    decoder: str | Path,
    output: str | Path,
    tokenizer: str | None = None,
    heads: int | None = None,
) -> None:
    """Write Meta's checkpoints as OUTPUT/encoder and OUTPUT/decoder; on an error, nothing is written.

    Args:
        encoder: A .pt with `{"model": state_dict}`, or .safetensors.
        decoder: The same.
        output: A new or empty folder.
        tokenizer: NLLB's sentencepiece model, or a folder or hub id of NLLB's tokenizer, for both folders; None: it has
            to be added later.
        heads: Attention heads, which the weights do not determine; default: that in a header, else one for 64
            dimensions.

    Raises:
        InputError: With every error: other files, or a tokenizer with another vocabulary.
    """
    errors = Collector()
    with errors:
        check_new(output)
    models: dict[str, Any] = {}
    for part, path in (("encoder", encoder), ("decoder", decoder)):
        with errors:
            models[part] = _model(part, Path(path), heads)
    tokens = None
    if tokenizer is not None:
        with errors:
            tokens = _tokenizer(tokenizer)
            for part, model in models.items():
                _check_vocabulary(tokens, tokenizer, model.config.vocab_size, part)
    errors.raise_if_any()
    with new_folder(output) as folder, silence_transformers():
        for part, path in (("encoder", encoder), ("decoder", decoder)):
            models[part].save_pretrained(folder / part)
            if tokens is not None:
                tokens.save_pretrained(folder / part)
            card = CARD.format(part=part, checkpoint=Path(path).name)
            (folder / part / "README.md").write_text(card, encoding="utf-8")
    print(f"{output}/encoder and {output}/decoder: SONAR, {models['encoder'].config.d_model} dimensions per concept")
    if tokens is None:
        print(f"they need NLLB's tokenizer: import again with --tokenizer {TOKENIZER} (or its sentencepiece.bpe.model)")


def _model(part: str, path: Path, heads: int | None) -> Any:
    """The encoder or decoder of a checkpoint, fp32, as a model of transformers."""
    from transformers import M2M100ForConditionalGeneration
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    metas_weights, header = read_checkpoint(path)
    weights = _renamed(metas_weights, part, path)
    output = weights.pop("final_proj.weight", None)
    config = _config(weights, header, part, heads, path)
    with torch.device("meta"):
        model: Any = M2M100Encoder(config) if part == "encoder" else M2M100ForConditionalGeneration(config)
    inner = model if part == "encoder" else model.model.decoder
    check_names(inner.state_dict(), weights, path, f"SONAR's {part}")
    if output is not None and not torch.equal(_reordered(output.float()), weights["embed_tokens.weight"]):
        raise InputError(f"{path}: final_proj.weight differs from decoder_frontend.embed.weight, unlike in SONAR")
    inner.load_state_dict(weights, assign=True)
    if part == "decoder":
        # transformers' model also has the same embedding under other names, and an encoder, here without layers.
        model.model.shared.weight = inner.embed_tokens.weight
        norm = {"weight": torch.ones(config.d_model), "bias": torch.zeros(config.d_model)}
        model.model.encoder.layer_norm.load_state_dict(norm, assign=True)
        model.tie_weights()
    return model


def _renamed(metas_weights: dict[str, Tensor], part: str, path: Path) -> dict[str, Tensor]:
    """The weights of one part under transformers' names, fp32, with the embedding in transformers' token order."""
    unprefixed = {re.sub(r"^(module\.)?(model\.)?", "", name): tensor for name, tensor in metas_weights.items()}
    embedding = f"{part}_frontend.embed.weight"
    if f"{part}.{embedding}" in unprefixed:  # a file with both parts, each with its prefix
        prefix = f"{part}."
        unprefixed = {
            name.removeprefix(prefix): tensor for name, tensor in unprefixed.items() if name.startswith(prefix)
        }
    if embedding not in unprefixed or unprefixed[embedding].ndim != 2:
        raise InputError(f"{path}: not SONAR's text {part}: {embedding} is missing")
    weights = {}
    for name, tensor in unprefixed.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor.float()
    weights["embed_tokens.weight"] = _reordered(weights["embed_tokens.weight"])
    return weights


def _reordered(embedding: Tensor) -> Tensor:
    """An embedding [vocabulary, d_model] in transformers' token order."""
    return torch.cat([embedding[list(TOKEN_ORDER)], embedding[len(TOKEN_ORDER) :]])


def _config(weights: dict[str, Tensor], header: dict[str, str], part: str, heads: int | None, path: Path) -> Any:
    """Sizes, from the shapes of the weights."""
    from transformers import M2M100Config

    vocabulary, d_model = weights["embed_tokens.weight"].shape
    inner = weights.get("layers.0.fc1.weight")
    if inner is None:
        raise InputError(f"{path}: not SONAR's text {part}: it has no layers")
    heads = attention_heads(heads, header, "heads", d_model, HEAD_DIM, path)
    if heads < 1 or d_model % heads:
        raise InputError(f"{path}: --heads {heads}: has to divide the hidden size {d_model}")
    sizes: dict[str, Any] = {}
    for each in ("encoder", "decoder"):
        sizes[f"{each}_layers"] = layer_count(weights) if each == part else 0
        sizes[f"{each}_attention_heads"], sizes[f"{each}_ffn_dim"] = heads, len(inner)
    positions = header_number(header, "max_seq_len", int, MAX_TOKENS, path)
    return M2M100Config(vocab_size=vocabulary, d_model=d_model, max_position_embeddings=positions, **sizes)


def _tokenizer(name: str) -> Any:
    """NLLB's tokenizer, from its sentencepiece model, a folder or the hub."""
    from transformers import NllbTokenizer

    work_offline_without(name)
    try:
        if not Path(name).is_file():
            return NllbTokenizer.from_pretrained(name, legacy_behaviour=False)
        return tokenizer_of_pieces(name)
    except ImportError as error:
        raise InputError(f"--tokenizer {name}: needs pip install 'lcm-ds[prepare]': {str(error).strip()}") from None
    except Exception as error:  # protobuf raises its own
        raise InputError(f"--tokenizer: {unreachable(name, error)}") from None


def _check_vocabulary(tokenizer: Any, name: str, vocabulary: int, part: str) -> None:
    """Raise InputError unless the languages have the ids of fairseq2's vocabulary, and its size matches."""
    ids = [tokenizer.convert_tokens_to_ids(language) for language in nllb_languages()]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise InputError(f"--tokenizer {name}: does not have NLLB's {len(ids)} languages in their order")
    size = ids[0] + len(ids) + EXTRA_TOKENS
    if size != vocabulary:
        raise InputError(f"--tokenizer {name}: is for a vocabulary of {size} tokens, the {part} has {vocabulary}")
