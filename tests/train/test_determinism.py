"""`train.deterministic`: no operation of a run gives other bits when it is repeated, on GPUs either."""

import json
import os
import subprocess
import sys

import pytest
import torch
from operations_worker import Recorder
from runs import ROOT

from lcm_ds.baselines.targets import running_mean
from lcm_ds.evaluate.accumulator import Accumulator
from lcm_ds.model.attention import SegmentLayout

# torch.use_deterministic_algorithms: those raise an error on GPUs (or act otherwise than without it: index_add,
# scatter_add), as far as tensors of a run could get into them.
WITHOUT_ORDER = {
    "bincount with weights", "cumprod of floats", "cumsum of floats", "cumsum_ of floats", "embedding_bag", "histc",
    "index_add", "index_add_", "kthvalue", "median", "nanmedian", "nll_loss_forward", "put_", "scatter_add",
    "scatter_add_", "scatter_reduce", "scatter_reduce_",
}  # fmt: skip


@pytest.fixture
def recorded(make_config, tmp_path):
    """recorded(**changes) → what operations_worker.py records of a run with these changes of its config."""

    def record(**changes):
        config = make_config(steps=4, evaluate={"every": 2, "rows": 16}, log={"every": 1, "histograms": 2}, **changes)
        command = [sys.executable, str(ROOT / "tests/support/operations_worker.py"), str(config), str(tmp_path / "out")]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":16384:2"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / "out").read_text())

    return record


def test_nothing_runs_before_it_is_set_and_no_operation_of_a_run_is_without_an_order(recorded):
    found = recorded(train={"deterministic": True})
    # torch refuses products on GPUs with the workspace that the variable named before
    assert found["settings"] == {"algorithms": True, "inductor": True, "cublas": ":4096:8", "fills": False}
    operations = set(found["operations"])  # of steps, histograms and validations
    assert {"lcm_ds::linear_backward", "_fused_adamw_", "bincount", "index_put_", "special_entr"} <= operations
    assert operations & WITHOUT_ORDER == set()


def test_it_is_off_by_default(recorded):
    settings = recorded()["settings"]
    assert settings == {"algorithms": False, "inductor": False, "cublas": ":16384:2", "fills": True}


def test_the_sums_of_the_evaluation_have_an_order():
    sums, documents = Accumulator(torch.device("cpu")), torch.tensor([3, 1, 3])
    with Recorder() as recorder:
        sums.add("mse", torch.tensor([1.0, torch.nan, 3.0]), documents, torch.tensor([0, 1, 1]))
        sums.add_vectors("variance", torch.ones(3, 4), documents)
        sums.add_spectrum(torch.ones(3, 4), documents)
    assert "index_put_" in recorder.operations
    assert recorder.operations & WITHOUT_ORDER == set()


def test_the_running_mean_is_that_of_the_concepts_so_far_in_the_segment():
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0] * 5 + [1] * 8 + [2] * 3, [0] * 16, [0] + [1] * 6 + [-1] * 9])
    concepts = torch.randn(3, 16, 4, generator=generator)
    concepts[0, 4] = torch.nan  # of another segment
    layout = SegmentLayout.from_ids(ids, 16)
    with Recorder() as recorder:
        means = running_mean(concepts, layout.positions, layout.max_seqlen)
    assert recorder.operations & WITHOUT_ORDER == set()
    for row in range(3):
        for t in range(16):
            first = t - int(layout.positions[row, t])
            expected = concepts[row, first : t + 1].double().mean(0).float()
            torch.testing.assert_close(means[row, t], expected, equal_nan=True)
