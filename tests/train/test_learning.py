"""Runs learn data whose optimal loss is known."""

import shutil

import numpy as np
import pytest
from runs import metrics

from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, read_normalizer, write_normalizer
from lcm_ds.data.normalizer import fit
from lcm_ds.data.shard import open_shard
from lcm_ds.data.writer import Document, write_shard

DIMS, LENGTH, NOISE = 16, 32, 0.5


@pytest.fixture(scope="session")
def rotations(tmp_path_factory):
    """rotations(documents, seed): datasets whose next concept is the last one turned by a fixed rotation, plus noise.

    The variance stays 1; nobody can predict better than with a squared error of NOISE² a dimension.
    """
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(DIMS, DIMS)))

    def make(documents, seed):
        folder, random = tmp_path_factory.mktemp("rotations"), np.random.default_rng(seed)
        states = [random.normal(size=(documents, DIMS))]
        while len(states) < LENGTH:
            kept = (1 - NOISE**2) ** 0.5 * states[-1] @ turn.T
            states.append(kept + NOISE * random.normal(size=(documents, DIMS)))
        concepts = np.stack(states, axis=1).astype(np.float32)
        texts = ["A sentence."] * LENGTH
        made = [Document(f"{i:06d}", f"{seed}-{i}", "tests", texts, each) for i, each in enumerate(concepts)]
        for first in range(0, documents, 250):
            commit(folder, write_shard(folder, f"{first:06d}.tar", made[first : first + 250]))
        write_normalizer(folder, *fit(concepts.reshape(-1, DIMS)), {})
        finish(folder, DatasetInfo(encoder={"name": "rotation"}, embed_dim=DIMS, dtype="float16"))
        return folder

    return make


MODEL = {
    "embed_dim": DIMS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.slow
def test_a_rotation_is_learnt_down_to_its_noise(trained, rotations_pair):
    train, validation = rotations_pair
    config = trained(
        1,
        model=MODEL,
        data={"train": str(train), "validation": str(validation), "row_length": LENGTH, "max_segment": LENGTH},
        batch={"rows_per_step": 32, "micro_batch_rows": 32},
        noise_std=0.3,
        optim={"lr": 5.0e-3, "schedule": {"name": "cosine", "warmup_steps": 10, "final": 0.01}},
        steps=400,
        evaluate={"every": None},
    )
    _, scale = read_normalizer(train)
    floor = NOISE**2 * float((1 / scale**2).mean())
    assert floor * 0.95 < metrics(config, "val_loss")[400] < floor * 1.1


@pytest.fixture(scope="session")
def rotations_pair(rotations):
    train, validation = rotations(4000, 1), rotations(200, 2)
    shutil.copy(train / "normalizer.safetensors", validation)
    return train, validation


def test_two_layers_memorise_eight_rows(trained, rotations):
    rows = rotations(8, 3)
    config = trained(
        1,
        model={**MODEL, "hidden_size": 128},
        data={"train": str(rows), "row_length": LENGTH, "max_segment": LENGTH},
        batch={"rows_per_step": 8, "micro_batch_rows": 8},
        noise_std=0.0,
        optim={"lr": 3.0e-3, "weight_decay": 0.0, "schedule": {"name": "cosine", "warmup_steps": 10, "final": 0.01}},
        steps=400,
        log={"every": 100},
    )
    _, scale = read_normalizer(rows)
    # What predicting the mean of all targets would give, in normalised space.
    shard = open_shard(open_dataset(rows), 0)
    targets = np.concatenate([shard.concepts(i).astype(np.float64)[1:] for i in range(len(shard))])
    mean_baseline = (((targets - targets.mean(axis=0)) / scale) ** 2).mean()
    assert metrics(config, "loss")[400] < 0.01 * mean_baseline
