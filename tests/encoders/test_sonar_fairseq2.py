"""Our pooling over transformers' classes against outputs of a tiny SONAR made with fairseq2, where SONAR comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import M2M100Config, M2M100ForConditionalGeneration
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from lcm_ds.encoders.sonar import embed

GOLDEN = Path(__file__).parents[1] / "data" / "sonar_text_fairseq2.safetensors"
RENAMED = [
    ("ffn.inner_proj", "fc1"),
    ("ffn.output_proj", "fc2"),
    ("ffn_layer_norm", "final_layer_norm"),
    ("encoder_decoder_attn", "encoder_attn"),
    ("output_proj", "out_proj"),
]
# fairseq2 counts <pad> <unk> <s> </s>, transformers <s> <pad> </s> <unk>.
ROWS = [2, 0, 3, 1]


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], M2M100Config]:
    with safe_open(GOLDEN, "pt") as file:
        sizes = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = M2M100Config(
        vocab_size=int(sizes["vocab"]),
        d_model=int(sizes["model_dim"]),
        max_position_embeddings=int(sizes["max_seq_len"]),
        **{f"{part}_layers": int(sizes["layers"]) for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": int(sizes["heads"]) for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": int(sizes["ffn"]) for part in ("encoder", "decoder")},
    )
    return tensors, config


def weights(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The encoder's or the decoder's weights under transformers' names."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{part}."):
            name = name.removeprefix(f"{part}.").removeprefix(f"{part}.")
            for old, new in RENAMED:
                name = name.replace(old, new)
            if name.endswith("_frontend.embed.weight"):
                name, tensor = "embed_tokens.weight", torch.cat([tensor[ROWS], tensor[4:]])
            found[name] = tensor
    return found


def renumbered(ids: Tensor) -> Tensor:
    """fairseq2's token ids as transformers'."""
    return torch.tensor([ROWS.index(row) for row in range(4)] + list(range(4, 128)))[ids.long()]


def test_the_encoder_is_fairseq2s(golden: tuple[dict[str, Tensor], M2M100Config]) -> None:
    tensors, config = golden
    encoder = M2M100Encoder(config).eval()
    encoder.load_state_dict(weights(tensors, "encoder"))
    mask = torch.arange(tensors["input_ids"].shape[1])[None] < tensors["input_lengths"][:, None]
    with torch.no_grad():
        concepts = embed(encoder, renumbered(tensors["input_ids"]), mask.long())
    torch.testing.assert_close(concepts, tensors["sentence_embeddings"], atol=1e-6, rtol=1e-5)


def test_the_decoder_is_fairseq2s(golden: tuple[dict[str, Tensor], M2M100Config]) -> None:
    tensors, config = golden
    decoder = M2M100ForConditionalGeneration(config).eval()
    named = weights(tensors, "decoder")
    output = named.pop("final_proj.weight")
    decoder.model.decoder.load_state_dict(named)
    with torch.no_grad():
        states = decoder.model.decoder(
            input_ids=renumbered(tensors["prefix_ids"]),
            encoder_hidden_states=tensors["sentence_embeddings"][:, None],
        ).last_hidden_state
    torch.testing.assert_close(states @ output.T, tensors["logits"], atol=1e-5, rtol=1e-5)
