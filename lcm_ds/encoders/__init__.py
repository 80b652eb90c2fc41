"""Sentences → concepts, and concepts → sentences."""

from lcm_ds.encoders.base import Encoder
from lcm_ds.encoders.load import load_encoder

__all__ = ["Encoder", "load_encoder"]
