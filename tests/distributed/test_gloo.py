"""Collectives built of gloo's faster ones have the values of torch's."""

import pytest
from runs import launch_workers


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gathers_and_sums_of_parts_have_torch_s_values(ranks):
    launch_workers("gloo_worker.py", ranks=ranks)
