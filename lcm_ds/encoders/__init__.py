"""Sentences → concepts, and concepts → sentences."""

from lcm_ds.encoders.base import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]
