"""Under every DeepSpeed JSON a run is trained, resumed on other ranks, exported, evaluated and generated from.

The right weights are those that the live engine has held when it ended (whole_way_worker.py). A JSON that is added to
ds_configs is tested, too.
"""

import json
import shutil

import pytest
import torch
from runs import ROOT, launch_workers, metrics, run_dir
from safetensors.torch import load_file

from lcm_ds import BaseLCM, deepspeed_config
from lcm_ds.checkpoint.format import load_model
from lcm_ds.checkpoint.model_source import find_model
from lcm_ds.convert.export import export
from lcm_ds.errors import InputError
from lcm_ds.generate.sampler import generate

SAVED_AT, LAST = 4, 6
JSONS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))}
JSONS["zero0_fp32"] = {"zero_optimization": {"stage": 0}}
JSONS["zero0_bf16"] = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}
JSONS["zero0_muon"] = {**JSONS["zero0_bf16"], "optimizer": {**JSONS["zero1_muon"]["optimizer"]}}
QUICK = ("zero1_bf16",)  # from two ranks to one; the others are marked slow


def is_quick(name, ranks):
    return name in QUICK and ranks == (2, 1)


CASES = [
    pytest.param(
        name, ranks, marks=() if is_quick(name, ranks) else pytest.mark.slow, id="-".join(map(str, (name, *ranks)))
    )
    for ranks in ((2, 1), (1, 2))
    for name in JSONS
]
OF_TWO_RANKS = [case for case in CASES if case.values[1] == (2, 1)]


@pytest.fixture(scope="module")
def way(make_config, tmp_path_factory):
    """way(name, ranks) -> the configs of a run on ranks[0], of what it becomes on ranks[1], and of one that starts
    from it, and their workers' output; all names of `ranks` share two launches.
    """
    nvme = tmp_path_factory.mktemp("nvme")
    launched = {}

    def configured(name, **changes):
        model = {"embed_dim": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        return make_config(
            **{
                "model": {**model, "num_attention_heads": 2},
                "optim": {"lr": 1e-2, "max_grad_norm": 0.0 if "muon" in name else 1.0},
                "steps": LAST,
                "checkpoint": {"every": SAVED_AT},
                "evaluate": {"every": None, "rows": 8},
                "log": {"every": 1, "samples": 0},
                "deepspeed": json.loads(json.dumps(JSONS[name]).replace("/local_nvme", str(nvme))),
                **changes,
            }
        )

    def go(names, ranks):
        folder = tmp_path_factory.mktemp("way")
        firsts = {name: configured(name) for name in names}
        outcomes = launch(firsts, folder / "first", ranks[0])
        others = {}
        for name, first in firsts.items():
            resumed = configured(name)
            shutil.copytree(run_dir(first), run_dir(resumed))
            shutil.rmtree(run_dir(resumed) / f"checkpoints/step_{LAST:08d}")
            others[name] = resumed
            if ranks == (2, 1):
                others[f"{name} from it"] = configured(name, model={"init_from": str(run_dir(first))}, steps=2)
        outcomes |= launch(others, folder / "other", ranks[1])
        return firsts, others, outcomes, folder

    def launch(configs, folder, ranks):
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps({name: str(config) for name, config in configs.items()}))
        launch_workers("whole_way_worker.py", folder / "plan.json", folder, ranks=ranks)
        results = json.loads((folder / "results.json").read_text())
        return {(folder.name, name): result for name, result in results.items()}

    def way(name, ranks):
        if (lacking := missing(name)) is not None:
            pytest.skip(lacking)
        quick = is_quick(name, ranks)
        if (ranks, quick) not in launched:
            names = [name for name in JSONS if is_quick(name, ranks) == quick and missing(name) is None]
            launched[ranks, quick] = go(names, ranks)
        return launched[ranks, quick]

    return way


def missing(name):
    """Why this machine's device cannot run a JSON; None: it can."""
    try:
        deepspeed_config.check_device(JSONS[name], name)
    except InputError as error:
        return str(error)
    return None


def refusal(name):
    """Why a checkpoint of a JSON cannot be converted for other ranks; None: it can, or need not be."""
    if deepspeed_config.offloads_to_nvme(JSONS[name]):
        return "what is offloaded to NVMe cannot be converted"
    return "DeepSpeed converts only Adam's states" if name == "zero1_muon" else None


def same(model, masters):
    return all(torch.equal(parameter, masters[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_the_exported_weights_are_bit_identical_to_the_live_masters(way, tmp_path, name, ranks):
    firsts, _, outcomes, folder = way(name, ranks)
    assert outcomes["first", name] == 0
    masters = load_file(folder / "first" / f"{name}.safetensors")
    export(run_dir(firsts[name]), tmp_path / "model")
    model = BaseLCM.from_pretrained(tmp_path / "model")
    assert dict(model.named_parameters()).keys() == masters.keys()
    assert same(model, masters)
    older = load_model(run_dir(firsts[name]), SAVED_AT)[0]
    assert not any(torch.equal(weight, masters[key]) for key, weight in older.named_parameters())


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_it_resumes_on_other_ranks_or_is_refused_with_the_reason_and_unchanged(way, name, ranks):
    firsts, others, outcomes, folder = way(name, ranks)
    run = run_dir(others[name])
    if refusal(name) is not None:
        (line,) = outcomes["other", name]
        assert f"was saved by {ranks[0]} rank(s)" in line
        assert refusal(name) in line
        first = run_dir(firsts[name])
        for path in run.rglob("*"):
            assert (
                path.is_dir()
                or path.name == "log.txt"
                or path.read_bytes() == (first / path.relative_to(run)).read_bytes()
            )
        return
    assert outcomes["other", name] == 0
    assert f"changed since step {SAVED_AT}:\n  ranks  {ranks[0]} → {ranks[1]}" in (run / "log.txt").read_text()
    model, _, step = load_model(run)
    assert step == LAST
    assert same(model, load_file(folder / "other" / f"{name}.safetensors"))
    # Gradients are summed in another order, with a rounding to 24 or to 8 bits.
    losses = [[metrics(config, "loss")[step] for step in (5, 6)] for config in (firsts[name], others[name])]
    assert losses[1] == pytest.approx(
        losses[0], rel=1e-5 if deepspeed_config.precision(JSONS[name]) == "float32" else 0.01
    )


@pytest.mark.parametrize(("name", "ranks"), OF_TWO_RANKS)
def test_it_is_evaluated_and_generated_from(way, call, name, ranks):
    firsts, _, _, folder = way(name, ranks)
    run = run_dir(firsts[name])
    code, out, err = call("evaluate", run)
    assert code == 0, err
    assert "Base-LCM" in out
    model = find_model(run).load()
    assert same(model, load_file(folder / "first" / f"{name}.safetensors"))
    (made,) = generate(model, [torch.randn(3, 16)], max_concepts=2, stop_repeat=None)
    assert made.concepts.shape == (2, 16)
    assert made.concepts.isfinite().all()


@pytest.mark.parametrize(("name", "ranks"), OF_TWO_RANKS)
def test_another_run_starts_from_it(way, name, ranks):
    firsts, others, outcomes, _ = way(name, ranks)
    second = others[f"{name} from it"]
    assert outcomes["other", f"{name} from it"] == 0
    assert f"weights from {run_dir(firsts[name])} (step {LAST})" in (run_dir(second) / "log.txt").read_text()
    # On the same rows: the first run's learning is kept.
    assert metrics(second, "loss")[1] < metrics(firsts[name], "loss")[1]
