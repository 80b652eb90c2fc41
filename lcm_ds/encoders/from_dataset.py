"""The encoder and the decoder of existing concepts, from the block `encoder` of their dataset.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from lcm_ds.config import EncoderConfig, validate
from lcm_ds.encoders.base import Encoder
from lcm_ds.encoders.load import load_encoder
from lcm_ds.errors import InputError

if TYPE_CHECKING:
    from lcm_ds.encoders.sonar import SonarDecoder

# Encoders whose decoder is known; another one is named by the key "decoder" of the encoder's block in dataset.json.
DECODERS = {"cointegrated/SONAR_200_text_encoder": "raxtemur/SONAR_200_text_decoder"}


def encoder_config(
    described: dict[str, Any], origin: str, device: str | None = None, language: str | None = None
) -> EncoderConfig:
    """The config of the encoder that a block `encoder` describes.

    Args:
        described: The block.
        origin: The file that it is from, for messages.
        device: As in EncoderConfig.
        language: Of the sentences to encode, an NLLB code; None for that of the block.

    Returns:
        The config.

    Raises:
        InputError: The encoder is not one of lcm-ds.
    """
    kinds = get_args(EncoderConfig.model_fields["name"].annotation)
    if described.get("name") not in kinds:
        raise InputError(
            f"{origin}: encoder.name: {described.get('name')!r} cannot encode a prompt (known here: {', '.join(kinds)})"
        )
    keys = {key: value for key, value in described.items() if key in EncoderConfig.model_fields and value is not None}
    # What computed the concepts is preferred, but not required: torch computes the same, to rounding.
    keys["backend"] = None if described.get("backend") == "openvino" else "torch"
    changes = {"device": device, "language": language}
    keys |= {key: value for key, value in changes.items() if value is not None}
    return validate(EncoderConfig, keys, f"{origin}: encoder")


def encoder_of(
    described: dict[str, Any], embed_dim: int, origin: str, device: str | None = None, language: str | None = None
) -> Encoder:
    """The encoder that made concepts, with the same weights and arithmetic.

    Args:
        described: The block `encoder` of their dataset.json.
        embed_dim: Their size.
        origin: The file that the block is from, for messages.
        device: As in EncoderConfig.
        language: Of the sentences to encode, an NLLB code; None for that of the block.

    Returns:
        The encoder.

    Raises:
        InputError: As for `encoder_config`; it cannot be loaded, or makes concepts of another size.
    """
    encoder = load_encoder(encoder_config(described, origin, device, language))
    if encoder.embed_dim != embed_dim:
        raise InputError(f"{origin}: embed_dim is {embed_dim}, encoder {described['model']} makes {encoder.embed_dim}")
    return encoder


def decoder_name(described: dict[str, Any]) -> str | None:
    """The hub id or folder of the decoder of an encoder's concepts; None if none is known."""
    if described.get("name") != "sonar":
        return None
    named = described.get("decoder", DECODERS.get(str(described.get("model"))))
    return None if named is None else str(named)


def decoder_of(
    named: str, described: dict[str, Any], embed_dim: int, device: str | None = None, language: str | None = None
) -> SonarDecoder:
    """A decoder for the concepts of an encoder.

    Args:
        named: The decoder's hub id or folder.
        described: The block `encoder` of the concepts' dataset.json.
        embed_dim: Their size.
        device: As in EncoderConfig.
        language: Of the decoded sentences, an NLLB code; None for the encoder's.

    Returns:
        The decoder.

    Raises:
        InputError: It cannot be loaded, or takes concepts of another size.
    """
    from lcm_ds.encoders.sonar import SonarDecoder

    decoder = SonarDecoder(named, language or described.get("language") or "eng_Latn", device=device)
    if decoder.embed_dim != embed_dim:
        raise InputError(f"decoder {named} takes {decoder.embed_dim} numbers, a concept here has {embed_dim}")
    return decoder
