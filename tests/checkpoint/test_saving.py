"""A background save holds the step at which it was started, and non-finite steps change nothing.

All ZeRO stages and precisions that were selected share one launch of two ranks (saving_worker.py).
"""

import json
from collections import OrderedDict

import pytest
import torch
from runs import launch_workers
from saving_worker import CHANGED, CONVERTED, VARIANTS

from lcm_ds.checkpoint import host_copy
from lcm_ds.checkpoint.format import saves_in_background
from lcm_ds.checkpoint.host_copy import HostBuffer
from lcm_ds.config import CheckpointConfig

# Each stage once, the shipped precisions, and what DeepSpeed does in another way; the others are marked slow, and so is
# the optimizer on the CPU, which waits for a compiler.
FAST = {
    "zero 0, fp32",
    "zero 1, bf16",
    "zero 1, bf16, gradients in fp32",
    "zero 2, bf16",
    "zero 3, bf16, gradients in fp32",
    "zero 1, bf16, Muon, gradients in fp32",
}


def variants(names=VARIANTS):
    """Parameters of a test."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """What saving_worker.py saw of the variants of all tests that were selected."""
    folder = tmp_path_factory.mktemp("saving")
    calls = [item.callspec for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = {call.params["name"] for call in calls if "name" in call.params}
    launch_workers("saving_worker.py", folder, json.dumps([name for name in VARIANTS if name in wanted]))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", variants())
def test_a_background_save_holds_the_step_at_which_it_was_started(results, name):
    found = results[name]
    assert found["busy"]
    assert found["saved"]
    assert found["again"] == found["went on"]
    assert found["weights again"] == found["weights"]
    assert len(set(found["again"])) > 1  # the weights change


@pytest.mark.parametrize("name", variants(name for name in VARIANTS if "Muon" not in name))  # fewer states than AdamW
def test_the_host_memory_of_a_save_is_the_predicted_one(results, name):
    # besides that: random states and normaliser, 15 kB, and padding
    assert 1 < results[name]["copied"] < 1.2


@pytest.mark.parametrize("name", variants(name for name in VARIANTS if "in turn" not in name))
def test_the_weights_of_a_checkpoint_are_bit_identical_to_the_live_masters(results, name):
    assert results[name]["read"] == []  # names of weights that differ


@pytest.mark.parametrize("name", variants())
def test_a_resumed_run_has_the_settings_of_its_config_and_not_those_of_the_checkpoint(results, name):
    found = results[name]["changed"]
    groups, clip_grad = found["new"]
    assert {group["weight_decay"] for group in groups} == {CHANGED["weight_decay"], 0.0}
    by_adam = [group for group in groups if not group.get("use_muon")]
    assert all(group["betas"] == CHANGED["betas"] and group["eps"] == CHANGED["eps"] for group in by_adam)
    assert clip_grad in (None, 0.0, 0.3)  # None: DeepSpeed's engine clips
    assert found["resumed"] == found["after a step"] == found["new"]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        pytest.param(name, other, marks=() if name in FAST else pytest.mark.slow)
        for name, some in CONVERTED.items()
        for other in some
    ],
)
def test_a_checkpoint_of_one_zero_stage_resumes_under_another(results, name, other):
    found = results[name]["converted"][other]
    close = 0.01 if "bf16" in name else 1e-5
    assert found["losses"] == pytest.approx(results[name]["went on"], rel=close)
    assert found["weight decay"] == [0.1, 0.0]


@pytest.mark.parametrize("name", variants())
def test_a_non_finite_value_on_one_rank_changes_no_weight_on_any_rank(results, name):
    assert results[name]["poisoned"] == ["nan", False, True]
    assert results[name]["skipped"] == 1


@pytest.mark.parametrize(
    ("configured", "zero", "background"),
    [
        (None, {"stage": 3}, True),
        (None, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, False),
        (True, {"stage": 3, "offload_optimizer": {"device": "nvme"}}, True),
        (False, {"stage": 1}, False),
    ],
)
def test_a_save_waits_by_default_if_the_optimizer_is_offloaded(configured, zero, background):
    assert saves_in_background(CheckpointConfig(background=configured), {"zero_optimization": zero}) is background


def test_a_host_copy_has_its_own_storage_of_the_tensors_size():
    buffer = torch.arange(1000.0)
    half = torch.tensor(1.5, dtype=torch.bfloat16)
    state = OrderedDict(
        part=buffer[10:20], again=[buffer[10:20]], same=(buffer, buffer), plain={"a": 1}, empty=buffer[:0], half=half
    )
    state["transposed"] = torch.arange(6).view(2, 3).t()
    copied = HostBuffer().copy_of(state)
    assert type(copied) is OrderedDict
    assert copied["part"].untyped_storage().nbytes() == 40
    assert copied["same"][0] is copied["same"][1]
    buffer.zero_()
    half.zero_()
    assert copied["part"].tolist() == copied["again"][0].tolist() == list(range(10, 20))
    assert copied["plain"] == {"a": 1}
    assert (copied["empty"].shape, copied["half"].item(), copied["half"].dtype) == ((0,), 1.5, torch.bfloat16)
    assert copied["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_host_memory_is_page_locked_once_and_reused_by_every_save(monkeypatch):
    monkeypatch.setattr(host_copy, "BLOCK", 1000)
    locked, unlocked = [], []
    buffer = HostBuffer(lambda block: locked.append(block) is None, unlocked.append)
    state = {"large": torch.arange(1000.0), "small": [torch.arange(5), torch.ones(3, dtype=torch.bool)]}
    for number in range(3):
        state["large"].add_(number)
        copied = buffer.copy_of(state)
        assert torch.equal(copied["large"], state["large"])
        assert copied["small"][0].tolist() == [0, 1, 2, 3, 4]
        assert copied["small"][1].tolist() == [True] * 3
        assert buffer.copied == 4000 + 40 + 3
        assert [len(block) for block in locked] == [4000, 1000]  # the first save's, and no more
        assert buffer.bytes == 5000
        blocks = [(block.data_ptr(), block.data_ptr() + len(block)) for block in locked]
        for tensor in (copied["large"], *copied["small"]):
            assert any(first <= tensor.data_ptr() < end for first, end in blocks)
        buffer.rewind()
    buffer.copy_of({**state, "more": torch.zeros(2000)})  # a larger state adds to it
    assert [len(block) for block in locked] == [4000, 1000, 8000]
    buffer.release()
    assert [block.data_ptr() for block in unlocked] == [block.data_ptr() for block in locked]
    assert buffer.bytes == 0


def test_what_cannot_be_page_locked_is_used_as_it_is_and_never_unlocked():
    unlocked = []
    buffer = HostBuffer(lambda block: False, unlocked.append)
    assert torch.equal(buffer.copy_of(torch.arange(5)), torch.arange(5))
    buffer.release()
    assert unlocked == []
