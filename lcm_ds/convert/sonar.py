"""SONAR's text encoder and decoder: from Meta's fairseq2 checkpoints to folders that our encoder and decoder load.

The same to rounding; transformers and fairseq2 only name things, and number the first four tokens, differently.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_ds.convert.fairseq2 import check_names, number_in, read_checkpoint
from lcm_ds.encoders.base import unreachable
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import check_new, new_folder
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
MAX_TOKENS = 512  # that Meta trained it on
# Of fairseq2's vocabulary, behind the pieces of sentencepiece: the languages, and three marks of where data came from.
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
    """Write the checkpoints (.pt `{"model": state_dict}`, or .safetensors) as OUTPUT/encoder and OUTPUT/decoder.

    tokenizer: NLLB's sentencepiece model, or a folder or hub id of NLLB's tokenizer, which goes into both folders;
    without one it has to be put there. heads: attention heads, which the weights do not tell; default: what a header
    says, else 64 dimensions each.

    `output` is whole or not there. Raises InputError with every mistake, for files that are no such checkpoints, and
    for a tokenizer of another vocabulary.
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
    print(f"{output}/encoder and {output}/decoder: SONAR, {models['encoder'].config.d_model} numbers a concept")
    if tokens is None:
        print(f"they need NLLB's tokenizer: import again with --tokenizer {TOKENIZER} (or its sentencepiece.bpe.model)")


def _model(part: str, path: Path, heads: int | None) -> Any:
    """The encoder or decoder of a checkpoint, fp32, as one of transformers' models."""
    from transformers import M2M100ForConditionalGeneration
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    found, header = read_checkpoint(path)
    weights = _renamed(found, part, path)
    output = weights.pop("final_proj.weight", None)
    config = _config(weights, header, part, heads, path)
    with torch.device("meta"):
        model: Any = M2M100Encoder(config) if part == "encoder" else M2M100ForConditionalGeneration(config)
    inner = model if part == "encoder" else model.model.decoder
    check_names(inner.state_dict(), weights, path, f"SONAR's {part}")
    if output is not None and not torch.equal(_reordered(output.float()), weights["embed_tokens.weight"]):
        raise InputError(f"{path}: final_proj.weight is not decoder_frontend.embed.weight, as it is in SONAR's decoder")
    inner.load_state_dict(weights, assign=True)
    if part == "decoder":
        # What transformers has beside a decoder: the same embedding under other names, and an encoder without layers.
        model.model.shared.weight = inner.embed_tokens.weight
        norm = {"weight": torch.ones(config.d_model), "bias": torch.zeros(config.d_model)}
        model.model.encoder.layer_norm.load_state_dict(norm, assign=True)
        model.tie_weights()
    return model


def _renamed(found: dict[str, Tensor], part: str, path: Path) -> dict[str, Tensor]:
    """The weights of one part under transformers' names, fp32, their embedding in transformers' order of tokens."""
    plain = {re.sub(r"^(module\.)?(model\.)?", "", name): tensor for name, tensor in found.items()}
    embedding = f"{part}_frontend.embed.weight"
    if f"{part}.{embedding}" in plain:  # a file with both parts, each under its name
        own = f"{part}."
        plain = {name.removeprefix(own): tensor for name, tensor in plain.items() if name.startswith(own)}
    if embedding not in plain or plain[embedding].ndim != 2:
        raise InputError(f"{path}: no text {part} of SONAR's in here: {embedding} is missing")
    weights = {}
    for name, tensor in plain.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor.float()
    weights["embed_tokens.weight"] = _reordered(weights["embed_tokens.weight"])
    return weights


def _reordered(embedding: Tensor) -> Tensor:
    """Rows of tokens [vocabulary, d_model] in transformers' order."""
    return torch.cat([embedding[list(TOKEN_ORDER)], embedding[len(TOKEN_ORDER) :]])


def _config(weights: dict[str, Tensor], header: dict[str, str], part: str, heads: int | None, path: Path) -> Any:
    """Sizes read off the weights' shapes."""
    from transformers import M2M100Config

    vocabulary, width = weights["embed_tokens.weight"].shape
    inner = weights.get("layers.0.fc1.weight")
    if inner is None:
        raise InputError(f"{path}: no text {part} of SONAR's in here: it has no layers")
    if heads is None:
        heads = number_in(header, "heads", int, width // HEAD_DIM if width % HEAD_DIM == 0 else None, path)
    if heads is None:
        raise InputError(f"{path}: --heads: the weights do not tell how many attention heads share {width}")
    if heads < 1 or width % heads:
        raise InputError(f"{path}: --heads {heads}: has to divide the width {width}")
    layers = {int(match[1]) for match in map(re.compile(r"layers\.(\d+)\.").match, weights) if match}
    sizes: dict[str, Any] = {}
    for each in ("encoder", "decoder"):
        sizes[f"{each}_layers"] = max(layers) + 1 if each == part else 0
        sizes[f"{each}_attention_heads"], sizes[f"{each}_ffn_dim"] = heads, len(inner)
    positions = number_in(header, "max_seq_len", int, MAX_TOKENS, path)
    return M2M100Config(vocab_size=vocabulary, d_model=width, max_position_embeddings=positions, **sizes)


def _tokenizer(name: str) -> Any:
    """NLLB's tokenizer, from its sentencepiece model, a folder or the hub."""
    from transformers import NllbTokenizer

    try:
        if not Path(name).is_file():
            return NllbTokenizer.from_pretrained(name, legacy_behaviour=False)
        from transformers.convert_slow_tokenizer import NllbConverter, SentencePieceExtractor

        extracted: Any = SentencePieceExtractor(name).extract(NllbTokenizer.model)
        pieces = NllbConverter.convert_from_spm(**extracted)
    except ImportError as error:
        raise InputError(f"--tokenizer {name}: needs pip install 'lcm-ds[prepare]': {str(error).strip()}") from None
    except Exception as error:  # protobuf raises its own
        raise InputError(f"--tokenizer: {unreachable(name, error)}") from None
    # What transformers would add itself comes here in NLLB's order, in which <mask> is the last.
    for token in (*_languages(), "<mask>"):
        pieces["vocab"].setdefault(token, len(pieces["vocab"]))
    return NllbTokenizer(**{**pieces, "additional_special_tokens": None})


def _check_vocabulary(tokenizer: Any, name: str, vocabulary: int, part: str) -> None:
    """Raise InputError unless the languages lie where they do in a vocabulary of that size of fairseq2's."""
    places = [tokenizer.convert_tokens_to_ids(language) for language in _languages()]
    if places != list(range(places[0], places[0] + len(places))):
        raise InputError(f"--tokenizer {name}: does not have NLLB's {len(places)} languages in their order")
    fitting = places[0] + len(places) + EXTRA_TOKENS
    if fitting != vocabulary:
        raise InputError(f"--tokenizer {name}: goes with {fitting} tokens, the {part} has {vocabulary}")


def _languages() -> list[str]:
    """The codes of NLLB's languages in the order of its vocabulary, which is that of Meta's SONAR cards."""
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    return list(FAIRSEQ_LANGUAGE_CODES)
