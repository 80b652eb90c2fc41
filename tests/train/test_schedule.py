"""The learning rate is a pure function of the step."""

from itertools import pairwise

import pytest

from lcm_ds.config import ScheduleConfig
from lcm_ds.train.schedule import learning_rate_factor


def factors(total, **schedule):
    return [learning_rate_factor(step, total, ScheduleConfig(**schedule)) for step in range(total)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_full_rate(name):
    warm = factors(100, name=name, warmup_steps=9)[:10]
    assert warm == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_cosine_falls_to_its_final_share_at_the_last_step():
    values = factors(101, name="cosine", final=0.1)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(values))


def test_wsd_is_constant_and_then_decays_linearly():
    values = factors(100, name="wsd", decay_steps=10, final=0.0)
    assert values[:91] == [1.0] * 91
    assert values[-1] == 0.0
    steps = {round(a - b, 6) for a, b in pairwise(values[90:])}
    assert len(steps) == 1


def test_constant_stays():
    assert factors(5, name="constant") == [1.0] * 5


def test_cosine_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="number of steps"):
        learning_rate_factor(5, None, ScheduleConfig(name="cosine"))
