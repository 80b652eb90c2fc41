"""Validation during training: the same metrics for any number of ranks, equal to those computed from weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from runs import run_dir

from lcm_ds.baselines.held_out import is_held_out
from lcm_ds.baselines.linear import RIDGES, TrainingSums, best_of
from lcm_ds.baselines.targets import TargetReader
from lcm_ds.checkpoint.format import load_model
from lcm_ds.config import DataConfig
from lcm_ds.data.format import open_dataset
from lcm_ds.data.loader import validation_batches
from lcm_ds.model.attention import SegmentLayout

ROWS = 16  # evaluate.rows of these runs


def validated(config):
    """The metrics of the last validation."""
    lines = [json.loads(line) for line in (run_dir(config) / "metrics.jsonl").read_text().splitlines()]
    return {key: value for line in lines if "val_loss" in line for key, value in line.items()}


def test_metrics_do_not_depend_on_the_number_of_ranks(trained):
    one, two = validated(trained(1)), validated(trained(2))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key


@pytest.fixture(scope="module")
def targets(trained, concepts):
    """For every validation target: prediction and truth in both spaces, and its context; from the weights."""
    model, *_ = load_model(run_dir(trained(2)))
    found = []
    for batch in validation_batches(open_dataset(concepts["validation"]), 32, 16, 4, 0, 1, ROWS):
        with torch.no_grad():
            predictions = model(batch.concepts, SegmentLayout.from_ids(batch.segment_ids, 16))
        for row, predicted, ids in zip(batch.concepts.float(), predictions, batch.segment_ids.tolist(), strict=True):
            for t in range(1, len(ids)):
                first = ids.index(ids[t])
                if ids[t] >= 0 and first < t:
                    found.append((predicted[t - 1], model.normalizer.normalize(row[t]), row[first:t], row[t]))
    return model.normalizer, found


def test_metrics_are_those_computed_from_the_weights(trained, targets):
    normalizer, found = targets
    figures = validated(trained(2))
    assert figures["val_targets"] == len(found)
    predicted, truth = (torch.stack([target[i] for target in found]) for i in (0, 1))
    raw, raw_truth = normalizer.denormalize(predicted), torch.stack([target[3] for target in found])
    last = normalizer.normalize(torch.stack([target[2][-1] for target in found]))

    def expect(key, value):
        assert figures[key] == pytest.approx(float(value), rel=1e-3), key

    expect("val_loss", (predicted - truth).square().mean())
    expect("val_l2", (raw - raw_truth).norm(dim=1).mean())
    expect("val_cosine", F.cosine_similarity(raw, raw_truth).mean())
    expect("val_loss_of_copy", (last - truth).square().mean())
    expect("val_loss_of_mean", (truth.mean(0) - truth).square().mean())
    assert figures["val_loss_of_ridge"] < figures["val_loss_of_mean"] < figures["val_loss_of_copy"]
    expect("val_variance_ratio", predicted.var(0).sum() / truth.var(0).sum())
    best = [
        (F.cosine_similarity(x, context).max(), F.cosine_similarity(y, context).max())
        for x, y, context in zip(raw, raw_truth, (target[2] for target in found), strict=True)
    ]
    expect(
        "val_par", torch.stack([of_prediction / of_truth for of_prediction, of_truth in best if of_truth > 0]).mean()
    )
    distances = torch.cdist(raw, raw_truth, compute_mode="donot_use_mm_for_euclid_dist")
    nearer = (distances < distances.diagonal().unsqueeze(1) - 1e-6).sum(1)
    expect("val_batch_recall_at_1", (nearer < 1).float().mean())
    expect("val_batch_recall_at_10", (nearer < 10).float().mean())
    expect("val_batch_mrr", (1 / (1 + nearer)).mean())
    spectrum = torch.linalg.svdvals(torch.cov(predicted.T))
    shares = spectrum / spectrum.sum()
    expect("val_effective_rank", (-(shares * shares.log()).sum()).exp())
    assert 1 < figures["val_effective_rank"] < figures["val_effective_rank_of_targets"] < 16
    assert 0.5 < figures["val_ca"] < 1


def test_the_ridge_is_fitted_to_the_training_data_and_chosen_there(trained, concepts, targets):
    normalizer, _ = targets
    reader = TargetReader(DataConfig(train=str(concepts["train"]), row_length=32, max_segment=16))
    training, validation = (open_dataset(concepts[split]) for split in ("train", "validation"))
    sums = TrainingSums.from_targets(
        ((rows.targets, is_held_out(rows.targets.document)) for _, rows in reader.rows(training, normalizer)),
        16,
        torch.device("cpu"),
        list,
    )
    ridges = sums.predictors(tuple(RIDGES))
    ridge = ridges[best_of(ridges)]
    errors = [(ridge(rows.targets) - rows.targets.truth).square().mean(1)
              for _, rows in reader.rows(validation, normalizer, ROWS)]  # fmt: skip
    assert validated(trained(2))["val_loss_of_ridge"] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-3)


def test_the_error_by_position_counts_the_concepts_before_a_target(trained, targets):
    _, found = targets
    by_position = validated(trained(2))["val_error_by_position"]
    assert len(by_position) == 15  # segments have 16 concepts at most
    for before, error in enumerate(by_position, start=1):
        its = [(x - y).square().mean() for x, y, context, _ in found if len(context) == before]
        assert error == pytest.approx(torch.stack(its).mean().item(), rel=1e-3)
