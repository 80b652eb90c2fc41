"""The encoder that a config names."""

from __future__ import annotations

from lcm_ds.config import EncoderConfig
from lcm_ds.encoders.base import Encoder


def load_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that a config names, ready on its device.

    Raises InputError if the model is neither a folder nor on the hub (or the hub cannot be reached), is another kind of
    model, has other weights than `revision` names, or does not know the language, or if the device does not exist.
    """
    if config.name == "sonar":
        from lcm_ds.encoders.sonar import SonarEncoder

        return SonarEncoder(config)
    from lcm_ds.encoders.sentence_transformer import SentenceTransformerEncoder

    return SentenceTransformerEncoder(config)
