"""Sums of gradients during the backward pass, norms and overflow checks over lists: DeepSpeed's values and skips."""

import json

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from gradients_worker import NONFINITE
from runs import ROOT, launch_workers

from lcm_ds.train.gradients import norms

pytestmark = pytest.mark.slow
ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}}}
FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 4}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
JSONS = {
    "BF16_Optimizer": {"zero_optimization": {"stage": 1}, **BF16, **FP32, **ADAM},
    "zero 1": {"zero_optimization": {"stage": 1}, **ADAM},
    "zero 2 bf16": {"zero_optimization": {"stage": 2}, **BF16, **FP32, **ADAM},
    "zero 2 offload": {"zero_optimization": {"stage": 2, **OFFLOAD}, **BF16, **FP32},
    "zero 0 bf16": {"zero_optimization": {"stage": 0}, **BF16, **ADAM},
    # Last, because DeepSpeed replaces F.linear for ZeRO-3 and leaves it so.
    "zero 3 bf16": {"zero_optimization": {"stage": 3}, **BF16, **FP32, **ADAM},
    "zero 3 offload": {"zero_optimization": {"stage": 3, **OFFLOAD}, **BF16, **FP32},
}
if get_accelerator().is_fp16_supported():
    JSONS = {"zero 2 fp16": {"zero_optimization": {"stage": 2}, **FP16, **FP32, **ADAM}, **JSONS}
# Name → changes of "BF16_Optimizer" or ZeRO-2 whose gradients are summed during the backward pass.
IN_FP32 = {**JSONS["BF16_Optimizer"], "communication_data_type": "fp32"}
IMMEDIATE = {**JSONS["BF16_Optimizer"], "bf16": {"enabled": True, "immediate_grad_update": True}}
SUMMED = {
    "one micro-batch": {},
    "two micro-batches, pieces": {"piece": 3000, "batch": {"micro_batch_rows": 2}},
    "four micro-batches": {"batch": {"micro_batch_rows": 1}},
    "four, none for a norm": {"batch": {"micro_batch_rows": 1}, "frozen": ("norm.weight", 0, (0, 1))},
    "four, one for a norm": {"batch": {"micro_batch_rows": 1}, "frozen": ("norm.weight", 1, (0, 1))},
    "recomputed, pieces": {"piece": 3000, "train": {"recompute": "layer"}},
    "sent in fp32": {"deepspeed": IN_FP32, "batch": {"micro_batch_rows": 1}},
    "immediate": {"deepspeed": IMMEDIATE, "batch": {"micro_batch_rows": 1}},
    "Muon": {"deepspeed": str(ROOT / "ds_configs/zero1_muon.json"), "optim": {"max_grad_norm": 0.0}},
    "all-reduced, pieces": {"all-reduced": True, "piece": 3000, "batch": {"micro_batch_rows": 2}},
    "zero 2, all-reduced, pieces": {"deepspeed": JSONS["zero 2 bf16"], "all-reduced": True, "piece": 3000},
    "zero 2": {"deepspeed": JSONS["zero 2 bf16"]},
    "zero 2, four micro-batches, pieces": {
        "deepspeed": JSONS["zero 2 bf16"],
        "piece": 3000,
        "batch": {"micro_batch_rows": 1},
    },
    "zero 2, four, one for a norm": {
        "deepspeed": JSONS["zero 2 bf16"],
        "batch": {"micro_batch_rows": 1},
        "frozen": ("norm.weight", 1, (0, 1)),
    },
    "zero 2, recomputed, pieces": {"deepspeed": JSONS["zero 2 bf16"], "piece": 3000, "train": {"recompute": "layer"}},
    "zero 2, sent in fp32": {"deepspeed": {**JSONS["zero 2 bf16"], "communication_data_type": "fp32"}},
    # Last, because DeepSpeed replaces F.linear for ZeRO-3 and leaves it so.
    "zero 3": {"deepspeed": JSONS["zero 3 bf16"]},
    "zero 3, four micro-batches, pieces": {
        "deepspeed": JSONS["zero 3 bf16"],
        "piece": 3000,
        "batch": {"micro_batch_rows": 1},
    },
    "zero 3, recomputed, pieces": {"deepspeed": JSONS["zero 3 bf16"], "piece": 3000, "train": {"recompute": "layer"}},
}
# A norm has no gradient on one rank: under ZeRO-1 DeepSpeed leaves it out, under ZeRO-2 it sends sizes that differ.
BY_RANK = {
    "by rank": {"piece": 3000, "frozen": ("norm.weight", 0, (1,))},
    "zero 2, by rank": {"deepspeed": JSONS["zero 2 bf16"], "piece": 3000, "frozen": ("norm.weight", 0, (1,))},
}
ON_ONE_RANK = {
    "one micro-batch": {"batch": {"micro_batch_rows": 8}},
    "four": {"batch": {"micro_batch_rows": 2}},
    "zero 2, four": {"deepspeed": JSONS["zero 2 bf16"], "batch": {"micro_batch_rows": 2}},
}
ON_FOUR_RANKS = {
    name: {"deepspeed": JSONS[json], "piece": 3000, "batch": {"micro_batch_rows": 1}}
    for name, json in {"zero 1": "BF16_Optimizer", "zero 2": "zero 2 bf16", "zero 3": "zero 3 bf16"}.items()
}
ON_FOUR_RANKS |= {f"{name}, all-reduced": {**ON_FOUR_RANKS[name], "all-reduced": True} for name in ("zero 1", "zero 2")}
ON_FOUR_RANKS["zero 3"] = ON_FOUR_RANKS.pop("zero 3")  # last, as above
DEEP = ("BF16_Optimizer", "zero 2 bf16", "zero 3 bf16")  # also with twice as many layers
# What a norm, a check or clipping calls for each gradient in DeepSpeed.
CALLS = ("linalg_vector_norm", "_foreach_norm", "amax", "amin", "logical_and", "mul_", "_foreach_mul_")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """lcm-ds's steps, as gradients_worker.py writes them."""
    return take_steps("lcm-ds", {**of_sums(SUMMED | BY_RANK), **of_jsons()}, tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def results(ours, tmp_path_factory):
    """DeepSpeed's and lcm-ds's."""
    return take_steps("deepspeed", of_jsons(), tmp_path_factory.mktemp("norms")), ours


@pytest.fixture(scope="module")
def sums(ours, tmp_path_factory):
    """Both with lcm-ds's norms: with DeepSpeed's sums, and summed during the backward pass."""
    return take_steps("norms", of_sums(SUMMED), tmp_path_factory.mktemp("sums")), ours


def of_jsons():
    variants = {name: {"deepspeed": ds, "optim": {"max_grad_norm": 0.05}} for name, ds in JSONS.items()}
    deep = {f"{name}, deep": {**variants[name], "model": {"num_hidden_layers": 6}} for name in DEEP}
    return {**variants, **deep}


def of_sums(variants):
    return {name: varied(changes) for name, changes in variants.items()}


@pytest.fixture(scope="module")
def sums_on_one_rank(tmp_path_factory):
    """As `sums`."""
    folder = tmp_path_factory.mktemp("sums")
    return [take_steps(whose, of_sums(ON_ONE_RANK), folder, ranks=1) for whose in ("norms", "lcm-ds")]


@pytest.fixture(scope="module")
def sums_on_four_ranks(tmp_path_factory):
    """As `sums`."""
    folder = tmp_path_factory.mktemp("sums")
    return [take_steps(whose, of_sums(ON_FOUR_RANKS), folder, ranks=4) for whose in ("norms", "lcm-ds")]


def varied(changes):
    return {"deepspeed": JSONS["BF16_Optimizer"], "optim": {"max_grad_norm": 0.05}, **changes}


def take_steps(whose, variants, folder, ranks=2):
    (folder / "variants.json").write_text(json.dumps(variants))
    launch_workers("gradients_worker.py", whose, folder / "variants.json", folder / whose, ranks=ranks)
    return json.loads((folder / whose).read_text())


def finite(values):
    return [value for index, value in enumerate(values) if index != NONFINITE]


@pytest.mark.parametrize("name", JSONS)
def test_the_values_are_those_of_deepspeed(results, name):
    theirs, ours = (found[name] for found in results)
    # The last bit of a norm may round a weight to another value, and decides how Adam moves one of no influence.
    half = "BF16" in name or "fp16" in name
    tolerance = 1e-3 if half else 1e-5
    assert ours["norms"][0] == pytest.approx(theirs["norms"][0], rel=1e-6)
    assert min(finite(theirs["norms"])) > 0.05  # all steps are clipped
    assert finite(ours["norms"]) == pytest.approx(finite(theirs["norms"]), rel=tolerance)
    assert finite(ours["losses"]) == pytest.approx(finite(theirs["losses"]), rel=tolerance)
    # Weights that are rounded to neighbouring values of bf16 differ by 2⁻⁸.
    assert ours["weights"] == pytest.approx(theirs["weights"], rel=2**-8 if half else tolerance)


@pytest.mark.parametrize("name", JSONS)
def test_a_step_whose_gradient_is_not_finite_on_one_rank_is_skipped_and_no_other(results, name):
    for found in results:
        assert found[name]["skipped"] == 1


@pytest.mark.parametrize("name", DEEP)
def test_calls_do_not_grow_with_the_number_of_gradients(results, name):
    theirs, ours = (
        [sum(found[name + depth]["calls"].get(call, 0) for call in CALLS) for depth in ("", ", deep")]
        for found in results
    )
    assert theirs[1] - theirs[0] >= 3 * 16  # one for each gradient of the further layers at least
    assert ours[1] == ours[0] < 12


def test_zero_3_gathers_what_stays_gathered_at_once_after_a_step(ours):
    for name in ("zero 3 bf16", "zero 3 bf16, deep"):
        calls = ours[name]["calls"]
        # A broadcast of each rank's part, in place of one for each rank and parameter.
        assert sum(count for call, count in calls.items() if call.startswith("c10d::broadcast")) == 2


def test_a_norm_of_many_values_on_a_cpu_is_exact():
    many, few = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 4.0])
    exact = torch.linalg.vector_norm(many, dtype=torch.float64).item()
    assert norms._norms([few, many, few[:0]]).tolist() == pytest.approx([5.0, exact, 0.0], rel=1e-6)
    assert norms._norms([many], torch.float64).dtype == torch.float64


@pytest.mark.parametrize("name", SUMMED)
def test_sums_during_the_backward_pass_have_the_bits_of_deepspeed_s(sums, name):
    theirs, ours = (found[name] for found in sums)
    assert ours["losses"][NONFINITE] != ours["losses"][NONFINITE]
    for what in ("losses", "norms", "weights", "skipped"):
        assert repr(ours[what]) == repr(theirs[what]), what
    assert ours["skipped"] == 1


def test_each_gradient_is_sent_once_a_step_in_pieces_before_the_backward_pass_has_ended(sums):
    _, found = sums
    counts = {name: len(found[name]["sent"]) for name in SUMMED}
    assert counts["one micro-batch"] == counts["four micro-batches"] == 2  # a piece for each group of parameters
    assert counts["two micro-batches, pieces"] == counts["recomputed, pieces"] > 8
    assert counts["zero 2, recomputed, pieces"] == counts["recomputed, pieces"]
    assert counts["zero 2, four micro-batches, pieces"] == 4 * counts["recomputed, pieces"]
    (values,) = {sum(found[name]["sent"]) for name in SUMMED if not name.startswith(("zero 2, four", "zero 3"))}
    assert sum(found["zero 2, four micro-batches, pieces"]["sent"]) == 4 * values
    # Under ZeRO-3 a parameter with an odd number of values is sent with one more.
    assert values <= sum(found["zero 3"]["sent"]) < 1.01 * values
    assert len(found["zero 3, recomputed, pieces"]["sent"]) > 8
    four, recomputed = (found[f"zero 3, {what}, pieces"]["sent"] for what in ("four micro-batches", "recomputed"))
    assert four == 4 * recomputed


def test_the_backward_pass_waits_for_a_piece_when_four_are_under_way(sums):
    for name in ("two micro-batches, pieces", "zero 2, recomputed, pieces", "zero 3, recomputed, pieces"):
        assert sums[1][name]["most under way"] == 4
    assert sums[1]["one micro-batch"]["most under way"] == 2


@pytest.mark.parametrize("name", BY_RANK)
def test_a_parameter_without_a_gradient_on_one_rank_is_in_the_norm_of_all(sums, name):
    one, other = sums[1][name]["norms of ranks"]
    assert one == other
    assert one[0] == pytest.approx(sums[1]["one micro-batch"]["norms"][-2], rel=0.1)


def test_the_sums_of_a_single_rank_are_deepspeed_s_and_under_zero_1_those_of_micro_batches_stay_fp32(sums_on_one_rank):
    for name in ON_ONE_RANK:
        theirs, ours = (found[name] for found in sums_on_one_rank)
        assert ours["sent"] == []
        assert (ours["taken by lcm-ds"], theirs["taken by lcm-ds"]) == (True, False)
        if name != "four":
            assert repr(ours["norms"]) == repr(theirs["norms"])
            assert ours["weights"] == theirs["weights"]
        else:
            assert finite(ours["norms"]) == pytest.approx(finite(theirs["norms"]), rel=1e-2)
            assert ours["norms"] != theirs["norms"]  # DeepSpeed rounds what it would send to bf16


@pytest.mark.parametrize("name", ON_FOUR_RANKS)
def test_the_sums_of_four_ranks_are_deepspeed_s_to_rounding(sums_on_four_ranks, name):
    theirs, ours = (found[name] for found in sums_on_four_ranks)
    assert (ours["taken by lcm-ds"], theirs["taken by lcm-ds"]) == (True, False)
    assert ours["norms"][0] == pytest.approx(theirs["norms"][0], rel=2**-9)
    assert finite(ours["losses"]) == pytest.approx(finite(theirs["losses"]), rel=1e-3)
    matrices = [name for name in theirs["weights"] if name.endswith("_proj.weight")]  # Adam moves others by rounding
    assert [ours["weights"][name] for name in matrices] == pytest.approx(
        [theirs["weights"][name] for name in matrices], rel=2**-8
    )
    assert ours["skipped"] == theirs["skipped"] == 1
