"""What is saved while the run goes on is the step it was saved at, and steps that are not finite change nothing.

All ZeRO stages and precisions share one launch of two ranks (saving_worker.py).
"""

import json
from pathlib import Path

import pytest
from runs import launch_workers
from saving_worker import PRECISIONS, VARIANTS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    launch_workers(Path(__file__).with_name("saving_worker.py"), folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_written_while_the_run_went_on_is_the_step_it_was_saved_at(results, name):
    found = results[name]
    assert found["saved"]
    assert found["again"] == found["went on"]
    assert found["weights again"] == found["weights"]
    assert len(set(found["again"])) > 1  # the model moves


@pytest.mark.parametrize("name", VARIANTS)
def test_a_number_that_is_not_finite_on_one_rank_changes_no_weight_on_any(results, name):
    assert results[name]["poisoned"] == ["nan", False, True]
    assert results[name]["skipped"] == 1


def test_every_stage_in_every_precision_was_tried():
    assert len(VARIANTS) == 4 * len(PRECISIONS)
