"""A SONAR of a few thousand weights, random but with all parts real: encoder, decoder and NLLB tokenizer, on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

TEXT = """
A concept is one sentence embedding. The model reads a row of concepts and predicts the next one.
It rains in the mountains, and the river rises; nobody had expected it so early in the year!
My name is SONAR. End of text. Who knows what 1,234 sentences sound like? She said: "Nothing at all."
"""


def save_tiny_sonar(
    folder: Path, embed_dim: int = 32, seed: int = 0, vocab_size: int | None = None
) -> tuple[Path, Path]:
    """Write ENCODER and DECODER below `folder` through save_pretrained; return their paths.

    vocab_size: of the models; default: as many tokens as their tokenizer has.
    """
    tokenizer = _tokenizer()
    config = M2M100Config(
        vocab_size=vocab_size or len(tokenizer),
        d_model=embed_dim,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(seed)
    paths = []
    for name, model in (("encoder", M2M100Encoder(config)), ("decoder", M2M100ForConditionalGeneration(config))):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.1)  # the library's 0.02 makes all outputs nearly equal
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        paths.append(folder / name)
    return paths[0], paths[1]


def _tokenizer() -> NllbTokenizer:
    """NLLB's tokenizer with a small vocabulary: byte pairs of TEXT, then the language codes."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        TEXT.splitlines(), trainers.BpeTrainer(vocab_size=256, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    return NllbTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
