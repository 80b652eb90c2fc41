"""Runs under DeepSpeed with real ranks: the loss does not depend on ranks, and a resumed run is bit-identical."""

import http.server
import json
import shutil
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from machine import patience
from runs import finish, metrics, run_dir, start

from lcm_ds.data.format import open_dataset
from lcm_ds.data.shard import Shard


def losses(config):
    return metrics(config, "loss")


def test_losses_do_not_depend_on_the_ranks(trained):
    one, two = losses(trained(1)), losses(trained(2))
    assert list(one) == list(two) == list(range(1, 41))
    assert two == pytest.approx(one, rel=1e-4)
    # The model learns, so the agreement is meaningful.
    assert min(one.values()) < 0.9 * one[1]


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(trained, make_config):
    undisturbed = trained(2)
    config = make_config()
    process = start("launch", "--local", 2, config)
    deadline = time.monotonic() + patience(120)
    while len(losses(config)) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    (run_dir(config) / "STOP").touch()
    code, out, err = finish(process)
    assert code == 75, out + err
    stopped_at = max(losses(config))
    assert 20 <= stopped_at < 40
    assert [path.name for path in (run_dir(config) / "checkpoints").glob("step_*")] == [f"step_{stopped_at:08d}"]
    assert not (run_dir(config) / "STOP").exists()
    code, out, err = finish(start("launch", "--local", 2, config))
    assert code == 0, out + err
    assert losses(config) == losses(undisturbed)
    assert metrics(config, "grad_norm") == metrics(undisturbed, "grad_norm")
    assert metrics(config, "concepts") == metrics(undisturbed, "concepts")
    # A third start has nothing to do.
    code, out, err = finish(start("train", config))
    assert code == 0, out + err
    assert "nothing to do" in out


def test_the_run_folder_has_all_files(trained):
    folder = run_dir(trained(2))
    for name in ("config.yaml", "ds_config.json", "metrics.jsonl", "log.txt"):
        assert (folder / name).is_file(), name
    assert "Warning" not in (folder / "log.txt").read_text()  # deprecations of libraries do not concern a user
    assert "# world_size: 2" in (folder / "config.yaml").read_text()
    assert "auto" not in json.dumps(json.loads((folder / "ds_config.json").read_text()))
    assert list((folder / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if "loss" in line)
    assert set(step) >= {
        "step", "concepts", "epoch", "loss", "grad_norm", "lr", "concepts_per_second", "mfu", "data_wait", "step_time",
        "skipped_steps", "memory",
    }  # fmt: skip
    assert step["mfu"] is None  # the peak of a CPU is unknown
    assert [line["step"] for line in lines if "val_loss" in line] == [20, 40]
    complete = json.loads((folder / "checkpoints/step_00000040/COMPLETE").read_text())["files"]
    assert set(complete) == {path.name for path in (folder / "checkpoints/step_00000040").iterdir()} - {"COMPLETE"}


@pytest.mark.slow
def test_losses_do_not_depend_on_the_zero_stage(trained):
    """Of each JSON: test_steps.py."""
    two = losses(trained(2))
    other = losses(trained(2, deepspeed="ds_configs/zero3_fp32.json", steps=40))
    for step in two:
        assert other[step] == pytest.approx(two[step], rel=1e-4)


@pytest.mark.slow
def test_bf16_follows_fp32(trained):
    exact = losses(trained(2))
    rough = losses(trained(2, deepspeed="ds_configs/zero3_bf16.json"))
    for step in exact:
        assert rough[step] == pytest.approx(exact[step], rel=0.03)


@pytest.mark.slow
def test_a_run_continues_without_a_bad_shard_if_the_config_allows_it(make_config, concepts, tmp_path):
    train = Path(shutil.copytree(concepts["train"], tmp_path / "train"))
    shard = sorted(train.glob("*.tar"))[3]
    shard.write_bytes(shard.read_bytes()[:-20000])
    data = {"train": str(train), "validation": str(concepts["validation"]), "row_length": 32, "max_segment": 16}
    code, out, err = finish(start("launch", "--local", 2, make_config(data=data)))
    assert code == 2
    assert f"{shard}: has " in err
    config = make_config(data={**data, "on_bad_shard": "skip"}, steps=None, epochs=2)
    code, out, err = finish(start("launch", "--local", 2, config))
    assert code == 0, out + err
    lines = [line for line in (run_dir(config) / "log.txt").read_text().splitlines() if "skipped: " in line]
    assert lines
    assert all(f"skipped: {shard}: " in line and "the file has become shorter" in line for line in lines)
    dataset = open_dataset(train, sizes=False)
    (index,) = [index for index, info in enumerate(dataset.shards) if info.name == shard.name]
    whole = Shard(concepts["train"] / shard.name)
    bytes_left = shard.stat().st_size
    cut = [i for i, offset in enumerate(whole.offsets) if offset + len(whole.stored(i)) > bytes_left]
    missing = metrics(config, "missing_concepts")
    assert missing[max(missing)] == 2 * int(dataset.index.lengths(index)[cut].sum())
    assert min(losses(config).values()) < 0.9 * losses(config)[1]


@pytest.mark.slow
def test_ranks_read_a_dataset_from_a_server_through_one_cache(trained, make_config, concepts, tmp_path):
    requests = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests[self.path.rpartition("/")[2]] += 1

    serves = partial(Handler, directory=Path(concepts["train"]).parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serves) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        data = {
            "train": f"http://127.0.0.1:{server.server_address[1]}/{Path(concepts['train']).name}",
            "validation": str(concepts["validation"]),
            "row_length": 32,
            "max_segment": 16,
            "cache_dir": str(tmp_path / "cache"),
        }
        config = make_config(data=data)
        code, out, err = finish(start("launch", "--local", 2, config))
        server.shutdown()
    assert code == 0, out + err
    assert losses(config) == losses(trained(2))
    fetched = {name: count for name, count in requests.items() if name.endswith(".tar")}
    assert set(fetched.values()) == {1}  # by one rank for both
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(fetched)
