"""A small fast encoder, and a script that prepares with it, slowed down: `python preparing.py CONFIG SECONDS`."""

import hashlib
import sys
import time

import numpy as np

from lcm_ds.config import PrepareConfig, load
from lcm_ds.prepare.pipeline import prepare

EMBED_DIM = 8


class HashEncoder:
    """A concept is a Gaussian draw seeded by its sentence; one with "not a number" in it has no concept."""

    name, model, embed_dim = "hash", "blake2b", EMBED_DIM

    def __init__(self, seconds=0.0, revision=None):
        self.seconds = seconds
        self.revision = revision
        self.seen = []

    def encode(self, texts):
        time.sleep(self.seconds)
        self.seen.extend(texts)
        concepts = np.stack([self.concept(text) for text in texts])
        return concepts

    def concept(self, text):
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        concept = np.random.default_rng(int.from_bytes(digest, "little")).normal(size=EMBED_DIM) * 0.05
        return np.full(EMBED_DIM, np.nan, np.float32) if "not a number" in text else concept.astype(np.float32)

    def describe(self):
        return {"name": self.name, "model": self.model, "revision": self.revision, "embed_dim": EMBED_DIM}


if __name__ == "__main__":
    prepare(load(PrepareConfig, sys.argv[1]), HashEncoder(float(sys.argv[2])))
