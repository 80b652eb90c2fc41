"""A small fast encoder, and a script that prepares with it, slowed down: `python preparing.py CONFIG SECONDS`."""

import hashlib
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from lcm_ds.config import PrepareConfig, load
from lcm_ds.encoders.base import TokenBatch, encode
from lcm_ds.errors import InputError
from lcm_ds.prepare import texts
from lcm_ds.prepare.pipeline import prepare

EMBED_DIM = 8
SECONDS = "TORCH_TEST_SECONDS"


class HashEncoder:
    """A concept is a Gaussian draw seeded by its sentence; "not a number" in it makes it NaN, "not a text" an error."""

    name, model, embed_dim = "hash", "blake2b", EMBED_DIM

    def __init__(self, seconds=0.0, revision=None):
        self.seconds = seconds
        self.revision = revision
        self.seen = []

    def tokenize(self, texts):
        found = []
        for start in range(0, len(texts), 5):
            some = texts[start : start + 5]
            found.append(TokenBatch(list(range(start, start + len(some))), {"texts": some}, len(some), len(some)))
        return found

    def embed(self, batch):
        time.sleep(self.seconds)
        self.seen.extend(batch.inputs["texts"])
        return np.stack([self.concept(text) for text in batch.inputs["texts"]])

    def encode(self, texts):
        return encode(self, texts)

    def concept(self, text):
        if "not a text" in text:
            raise ValueError("this is not a text")
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        concept = np.random.default_rng(int.from_bytes(digest, "little")).normal(size=EMBED_DIM) * 0.05
        return np.full(EMBED_DIM, np.nan, np.float32) if "not a number" in text else concept.astype(np.float32)

    def describe(self):
        return {"name": self.name, "model": self.model, "revision": self.revision, "embed_dim": EMBED_DIM}


def use_the_hash_encoder():
    """In this process, whatever a config names; its seconds are in a variable, which Ray's actors get, too."""
    texts.load_encoder = lambda config: HashEncoder(float(os.environ.get(SECONDS, "0")))


def written(folder):
    """Everything that a preparation leaves, but for the order in which lines were appended."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    files = [path for path in files if path.name not in ("prepare.yaml", "prepare.lock", "config.yaml")]
    bytes_of = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: sorted(data.splitlines()) if name.endswith(".jsonl") else data for name, data in bytes_of.items()}


if __name__ == "__main__":
    encoder = HashEncoder(float(sys.argv[2]))
    try:
        prepare(load(PrepareConfig, sys.argv[1]), encoder)
    except InputError as error:
        sys.exit(str(error))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"rank {os.environ.get('RANK')} encoded {len(encoder.seen)} sentences, peak {peak} KiB", flush=True)
