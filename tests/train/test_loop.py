"""The order of things in the training loop: results are read a step late, and before anything that needs them."""

from types import SimpleNamespace

import pytest
import torch
from steps_worker import CONFIG

from lcm_ds.config import TrainConfig
from lcm_ds.model.config import resolve_model
from lcm_ds.train.job import TrainJob
from lcm_ds.train.loop import Trainer
from lcm_ds.train.step import StepOutcome


@pytest.fixture
def order(monkeypatch, tmp_path):
    """Runs ten steps without a model: what happened, as "step 0", "read 0", "report 4" (after four steps) and so on."""

    def run(skipped=(), stop_at=None, save_at=None, **blocks):
        config = TrainConfig.model_validate(CONFIG | {"run_dir": str(tmp_path), "steps": 10} | blocks)
        ds = {"optimizer": {"params": {"eps": 1e-8}}}
        job = TrainJob(config, ds, resolve_model(config.model), [], None, SimpleNamespace(steps=None), "")
        happened = []

        def step(batches, index, flags, write_histograms):
            happened.append(f"step {index}")

            def read():
                happened.append(f"read {index}")
                flags = (int(index == stop_at), int(index == save_at), 0)
                return StepOutcome(1.0, 0.5, 8, True, 8, 0, 8, flags, (), 0.0)

            return SimpleNamespace(read=read)

        env = SimpleNamespace(rank=0, world_size=1)
        stepper = SimpleNamespace(job=job, env=env, engine=None, device=torch.device("cpu"), step=step, prepare=None)
        trainer = Trainer(
            stepper,
            loader=SimpleNamespace(map=lambda function: iter(())),
            saver=SimpleNamespace(pending=False, busy=lambda: False, in_background=True),
            watchdog=SimpleNamespace(beat=lambda text: None),
            run_log=None,
            stop=SimpleNamespace(steps_begin=lambda: None, requested=lambda: False),
            state={"concepts": 0, "losses": [], "learned": False},
            first_step=0,
            skipped_steps=[range(*skipped)] if skipped else [],
        )
        monkeypatch.setattr(trainer, "report", lambda done: happened.append(f"report {done}"))
        monkeypatch.setattr(trainer, "validate", lambda done: happened.append(f"validate {done}"))
        monkeypatch.setattr(trainer, "finish", lambda done, total: 0)

        def save(done, wait):
            happened.append(f"save {done}")
            trainer.save_due = False
            return True

        monkeypatch.setattr(trainer, "save", save)
        assert trainer.run() == 0
        return happened

    return run


def test_results_are_read_when_the_next_step_has_been_started(order):
    happened = order(log={"every": 100}, checkpoint={"every": None})
    late = [event for index in range(1, 9) for event in (f"step {index}", f"read {index - 1}")]
    assert happened == ["step 0", *late, "step 9", "read 8", "read 9", "report 10", "save 10"]


def test_everything_is_read_before_a_report_and_a_save(order):
    happened = order(log={"every": 4}, checkpoint={"every": 6})
    for done, event in ((4, "report 4"), (6, "save 6"), (8, "report 8"), (10, "save 10")):
        at = happened.index(event)
        assert f"read {done - 1}" in happened[:at]
        assert f"step {done}" not in happened[:at]


def test_a_stop_and_a_save_by_the_clock_come_a_step_after_they_were_agreed_on(order):
    settings = {"log": {"every": 100}, "checkpoint": {"every": None}}
    happened = order(stop_at=3, **settings)
    assert happened[happened.index("step 4") :] == ["step 4", "read 3", "read 4", "report 5", "save 5"]
    happened = order(save_at=3, **settings)
    at = happened.index("save 5")
    assert happened[at - 4 : at + 2] == ["step 4", "read 3", "read 4", "report 5", "save 5", "step 5"]


def test_steps_before_skipped_ones_are_read_before_their_line(order):
    happened = order(skipped=(3, 5), log={"every": 100}, checkpoint={"every": None})
    assert happened[: happened.index("step 5")] == [
        "step 0",
        "step 1",
        "read 0",
        "step 2",
        "read 1",
        "read 2",
        "report 3",
        "report 4",
    ]
