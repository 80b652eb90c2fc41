"""The shipped configs: the paper's recipe in the scale of our loss, and runs as long as their comments say."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig, load
from lcm_ds.deepspeed_config import accumulation_steps
from lcm_ds.errors import InputError
from lcm_ds.model.config import PRESETS, BaseLCMConfig
from lcm_ds.model.sizes import count_parameters
from lcm_ds.train.loss import squared_error
from lcm_ds.train.memory import USABLE, States, activations
from lcm_ds.train.monitoring.gradient_scale import GradientMeter

CONFIGS = Path(__file__).parents[2] / "configs/train"
# The quickstart has its own recipe, for 24 thousand sentences.
PAPERS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "quickstart")
PAPER_EPS, PAPERS_CLIP = 1e-5, 25.0  # arXiv 2412.08821, section 2.4.1; the loss is summed over dimensions
# Concepts to train on: FineWeb-Edu and its samples of 100 and 10 billion tokens without the hundredth for validation,
# and the 1000 documents of the mini one, with as many sentences each.
CONCEPTS = {
    "fineweb_edu_full": 0.99 * 60e9,
    "fineweb_edu_100bt": 0.99 * 5e9,
    "fineweb_edu_10bt": 0.99 * 0.5e9,
    "fineweb_edu_mini": 0.99 * 52e3,
}


def config_of(name):
    return load(TrainConfig, CONFIGS / f"{name}.yaml")


def steps_of(config):
    concepts = config.batch.rows_per_step * config.data.row_length
    known = next(size for name, size in CONCEPTS.items() if f"/{name}/" in config.data.train[0].path)
    steps = config.steps or config.epochs * known / concepts
    return steps, steps * concepts / known


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("size", [1e-5, 1.0], ids=["gradients near eps", "clipped gradients"])
def test_a_step_on_our_mean_equals_the_papers_on_its_sum(name, size):
    optim, dims = config_of(name).optim, PRESETS.get(name, {"embed_dim": 1024})["embed_dim"]
    generator = torch.Generator().manual_seed(1)
    start, truth = torch.randn(2, 4, dims, generator=generator) * size
    leaps = (3.0, 0.1, 10.0)  # factors of the targets, or all steps would be clipped alike
    mask = torch.ones(1, 3, dtype=torch.bool)

    def moved(loss, eps, clip):
        weights = torch.nn.Parameter(start.clone())
        adam = torch.optim.AdamW([weights], lr=1e-2 * size, betas=optim.betas, eps=eps, weight_decay=0)
        for leap in leaps:
            loss(weights, leap * truth).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_([weights], clip)
            adam.step()
            adam.zero_grad()
        return weights.detach() - start

    def ours(weights, truth):
        return squared_error(weights[None], truth[None, 1:].clone(), mask) / 3

    def papers(weights, truth):
        return (weights[:-1] - truth[1:]).square().sum(-1).mean()

    expected = moved(papers, PAPER_EPS, PAPERS_CLIP)
    assert torch.allclose(moved(ours, optim.eps, optim.max_grad_norm), expected, rtol=1e-3, atol=1e-6 * size)
    # Both values matter: without either the update differs.
    assert not torch.allclose(moved(ours, PAPER_EPS, optim.max_grad_norm), expected, rtol=1e-2)
    assert torch.allclose(moved(ours, optim.eps, 1.0), expected, rtol=1e-2) == (size < 1)


@pytest.mark.parametrize("name", [name for name in PAPERS if name != "finetune"])
def test_a_shipped_run_is_as_long_as_its_comments_say_with_a_short_warm_up(name):
    config = config_of(name)
    steps, epochs = steps_of(config)
    assert epochs == (config.epochs or pytest.approx(0.97, abs=0.01))
    assert 0.03 < config.optim.schedule.warmup_steps / steps < 0.06


def test_1_6b_is_as_long_as_the_papers_run():
    config = config_of("1.6b")
    assert config.steps == 250_000
    assert config.batch.rows_per_step * config.data.row_length == 32 * 7168
    assert config.optim.schedule.warmup_steps == 10_000


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_names_the_world_sizes_that_it_takes(path):
    config = load(TrainConfig, path)
    (named,) = re.findall(r"# World sizes: ([\d, ]+)", path.read_text())
    taken = []
    for ranks in range(1, 130):
        with contextlib.suppress(InputError):
            accumulation_steps(config.batch.rows_per_step, config.batch.micro_batch_rows, ranks, path)
            taken.append(ranks)
    assert [int(ranks) for ranks in named.split(",")] == taken
    if path.stem == "1.6b":
        assert taken == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(("rows", "gigabytes", "ranks"), [(16, 80, 16), (32, 141, 8)])
def test_larger_micro_batches_of_1_6b_fit_the_devices_that_its_comment_names(rows, gigabytes, ranks):
    config = load(TrainConfig, CONFIGS / "1.6b.yaml", [f"batch.micro_batch_rows={rows}"])
    assert f" {rows} (up to {ranks} ranks) on {gigabytes} GB" in (CONFIGS / "1.6b.yaml").read_text()
    for world_size in (1, ranks):
        assert accumulation_steps(config.batch.rows_per_step, rows, world_size, "1.6b.yaml")
        model = BaseLCMConfig(**PRESETS["1.6b"])
        ds = deepspeed_config.resolve(deepspeed_config.read(config.deepspeed), config, world_size, "json")
        kept = activations(model, rows * config.data.row_length, half=True)
        assert States.of(count_parameters(model), 1, world_size, ds).peak(kept) < USABLE * gigabytes * 1e9


# --- metrics and warning -----------------------------------------------------------------------------------------


def test_the_share_of_eps_is_that_of_adams_denominator():
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(10_000, generator=generator) * 3e-6
    meter = GradientMeter(len(gradient), 1e-6, clip=0)
    meter.add(gradient.norm())
    shares = 1e-6 / (gradient.square().mean().sqrt() + 1e-6)
    assert meter.read()["adam_eps_share"] == pytest.approx(float(shares), rel=1e-5)
    assert meter.read()["grad_norm"] == pytest.approx(float(gradient.norm()))


def test_a_clipped_gradient_counts_as_it_is_after_clipping():
    meter = GradientMeter(100, 1e-3, clip=0.1)
    meter.add(5.0)
    assert meter.read()["adam_eps_share"] == pytest.approx(1e-3 / (1e-3 + 0.01))


def test_clipped_is_the_share_of_the_steps_since_the_last_line():
    meter = GradientMeter(4, 1e-8, clip=1.0)
    for norm in (0.5, 1.5, float("inf"), 2.0):
        meter.add(norm)
    assert meter.read()["clipped"] == 0.5  # a step that is not finite is skipped, not clipped
    meter.reset()
    meter.add(0.5)
    assert meter.read()["clipped"] == 0.0
    off = GradientMeter(4, 1e-8, clip=0)
    off.add(9.0)
    assert off.read()["clipped"] == 0.0


def test_unknown_values_are_none():
    none = {"grad_norm": None, "clipped": None, "adam_eps_share": None}
    meter = GradientMeter(4, 1e-8, clip=1.0)
    assert meter.read() == none
    meter.add(None)
    assert meter.read() == none
    without = GradientMeter(4, None, clip=1.0)  # an optimizer without eps
    without.add(2.0)
    assert without.read() == {"grad_norm": 2.0, "clipped": 1.0, "adam_eps_share": None}
    assert without.eps_warning(1024) is None


def test_an_eps_above_the_gradients_is_named_once_with_the_papers():
    meter = GradientMeter(1_649_185_792, 1e-5, clip=25 / 1024)
    meter.add(0.2)
    line = meter.eps_warning(1024)
    assert line.startswith("optim.eps: 1e-05 is 94% of Adam's denominator (gradient per weight: 6e-07), ")
    assert "scales all updates by 0.057" in line
    assert "the LCM paper's eps corresponds to 9.77e-09 here: 1e-05 / 1024" in line
    assert meter.eps_warning(1024) is None
    scaled = GradientMeter(1_649_185_792, 1e-5 / 1024, clip=25 / 1024)
    scaled.add(0.2)
    assert scaled.eps_warning(1024) is None
    assert scaled.read()["adam_eps_share"] < 0.02
