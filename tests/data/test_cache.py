"""Shards that are elsewhere: servers that misbehave, ranks that share a cache, its bound, S3."""

from __future__ import annotations

import http.server
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machine import patience

from lcm_ds.data import open_shards
from lcm_ds.data.format import Dataset, open_dataset
from lcm_ds.data.index.first_use import indexed
from lcm_ds.data.loader import Loader
from lcm_ds.data.open_shards import VALIDATION_BLOCK, ShardPrefetcher
from lcm_ds.data.plan import Plan
from lcm_ds.data.remote import cache
from lcm_ds.data.remote import fetch as remote
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.shard import open_shard
from lcm_ds.data.supervised import source_of
from lcm_ds.errors import InputError, TransientError
from lcm_ds.files import OpenFile, sha256_of
from lcm_ds.train.job_builder import build_job

WORKER = Path(__file__).with_name("cache_worker.py")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `faults` are what it does to the coming requests for a path, in order, instead."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.faults: dict[str, deque[str]] = defaultdict(deque)
        self.requests: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is nothing to report."""


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests[name] += 1
        faults = self.server.faults[name]
        fault = faults.popleft() if faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
        elif fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault:
            self.body(Path(self.directory, name).read_bytes(), fault)
        else:
            super().do_GET()
            self.server.whole[name] += 1

    def body(self, data: bytes, fault: str) -> None:
        """200, and what is not the file."""
        self.send_response(200)
        if fault in ("short", "stall"):  # less than it says
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "changed":
            data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        elif fault == "long":
            data += bytes(1 << 16)
        else:  # "short", "stall", and "shorter": without saying how long it should be
            data = data[: len(data) // 2]
        self.wfile.write(data)
        self.wfile.flush()
        if fault == "stall":
            time.sleep(3)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing on the tests' stderr."""


@pytest.fixture
def served(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.05)
    server = Server(Path(dataset.path))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def dataset(synthetic_dataset: Callable[..., Path]) -> Dataset:
    return open_dataset(synthetic_dataset(documents=129, documents_per_shard=10, embed_dim=4, lengths=(2, 45)))


def there(served: Server, kept_in: Cache | Path) -> Dataset:
    return indexed(open_dataset(served.url, kept_in if isinstance(kept_in, Cache) else Cache(str(kept_in))))


def same(ours: Dataset, theirs: Dataset, index: int) -> None:
    one, other = open_shard(ours, index), open_shard(theirs, index)
    assert one.keys == other.keys
    for document in range(len(one)):
        np.testing.assert_array_equal(one.concepts(document), other.concepts(document))


def kept(folder: Path, dataset: Dataset) -> list[int]:
    """Which shards are in the cache; whatever is there has to be whole, and nothing half-done beside it."""
    tars = {path.stem: path for path in folder.glob("*.tar")}
    assert all(sha256_of(path) == name for name, path in tars.items())
    others = {path.name for path in folder.iterdir()} - {path.name for path in tars.values()}
    assert others <= {"lock", f"index-{dataset.fingerprint}"}
    return [index for index, shard in enumerate(dataset.shards) if shard.sha256 in tars]


# --- what can pass, and what cannot ---


@pytest.mark.parametrize("fault", ["503", "500", "429", "408", "drop", "short", "shorter", "changed", "long"])
def test_what_can_pass_is_tried_again(served: Server, dataset: Dataset, tmp_path: Path, fault: str) -> None:
    name = dataset.shards[3].name
    served.faults[name].extend([fault, fault])
    for small in ("dataset.json", "shards.jsonl", "normalizer.safetensors"):
        served.faults[small].extend([fault] * (fault in ("503", "429", "drop", "short")))
    same(dataset, there(served, tmp_path), 3)
    assert served.requests[name] == 3
    assert kept(tmp_path, dataset) == [3]


def test_a_server_that_sends_nothing_more_is_given_up(
    served: Server, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "READ_TIMEOUT", 0.3)
    served.faults[dataset.shards[0].name].append("stall")
    begun = time.monotonic()
    same(dataset, there(served, tmp_path), 0)
    assert time.monotonic() - begun < patience(2.5)


@pytest.mark.parametrize(("status", "said"), [("404", "cannot be fetched"), ("403", "403"), ("401", "401")])
def test_what_cannot_pass_is_an_error_at_once(
    served: Server, dataset: Dataset, tmp_path: Path, status: str, said: str
) -> None:
    name = dataset.shards[3].name
    served.faults[name].append(status)
    with pytest.raises(InputError, match=said) as caught:
        open_shard(there(served, tmp_path), 3)
    (line,) = caught.value.errors
    assert line.startswith(f"{served.url}/{name}: ")
    assert "\n" not in line
    assert caught.value.exit_code == 2
    assert served.requests[name] == 1
    assert kept(tmp_path, dataset) == []


def test_an_outage_that_lasts_is_no_mistake_of_the_users(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    name = dataset.shards[3].name
    served.faults[name].extend(["503", "short"] * 5)
    with pytest.raises(TransientError, match=f"{name}: cannot be read, tried {remote.ATTEMPTS} times: ") as caught:
        open_shard(there(served, tmp_path), 3)
    assert caught.value.exit_code == 1
    assert served.requests[name] == remote.ATTEMPTS
    assert kept(tmp_path, dataset) == []


def test_an_outage_leaves_out_the_rows_of_its_time_and_no_shard_for_good(
    served: Server, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(dataset, rows=2)
    skipping = replace(there(served, tmp_path), skip_bad=True)
    name, size = dataset.shards[3].name, dataset.shards[3].concepts
    failures = ["503"] * (2 * remote.ATTEMPTS)  # whoever fetches ahead, and whoever reads
    served.faults[name].extend(failures)
    missing = [batch.missing for batch in Loader([skipping], plan, 0, 1, 2)]
    assert sum(missing) == size  # a minute has not passed
    monkeypatch.setattr(open_shards, "RETRY_SECONDS", 0.0)
    shutil.rmtree(tmp_path)
    served.faults[name].extend(failures)
    batches = list(Loader([skipping], plan, 0, 1, 2))
    assert 0 < sum(batch.missing for batch in batches) <= 16 < size
    assert kept(tmp_path, dataset) == [*range(len(dataset.shards))]
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(lines) == 2
    assert lines[1].startswith(f"skipped for now: {served.url}/{name}: cannot be read, tried {remote.ATTEMPTS} times")
    # One that is damaged is skipped permanently; if nothing answers, the run ends.
    shutil.rmtree(tmp_path)
    served.faults[name].extend(["changed"] * (2 * remote.DAMAGED_ATTEMPTS))
    assert sum(batch.missing for batch in Loader([skipping], plan, 0, 1, 2)) == size
    shutil.rmtree(tmp_path)
    for shard in dataset.shards:
        served.faults[shard.name].extend(failures * 20)
    with pytest.raises(TransientError, match=r"2 of \d+ shards could not be read: too many to skip") as caught:
        list(Loader([skipping], plan, 0, 1, 2))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["dataset.json", "shards.jsonl", "normalizer.safetensors"])
def test_an_outage_stays_one_through_the_checks_of_a_run(
    served: Server, dataset: Dataset, tmp_path: Path, name: str
) -> None:
    config = tmp_path / "train.yaml"
    run = {
        "run_dir": str(tmp_path / "run"),
        "model": {"preset": "quickstart", "embed_dim": 4, "hidden_size": 16, "num_attention_heads": 2},
        "data": {"train": served.url, "cache_dir": str(tmp_path / "cache"), "row_length": 16},
        "batch": {"rows_per_step": 2, "micro_batch_rows": 2},
        "optim": {"lr": 1e-3},
        "steps": 2,
        "deepspeed": "ds_configs/zero1_fp32.json",
    }
    config.write_text(json.dumps(run))
    assert len(build_job(config, [], 1).datasets) == 1
    served.faults[name].extend(["503"] * remote.ATTEMPTS)
    with pytest.raises(TransientError, match=f"train.yaml: data.train: .*{name}: cannot be read") as caught:
        build_job(config, [], 1)
    assert caught.value.exit_code == 1
    served.faults[name].extend(["503"] * remote.ATTEMPTS)
    with pytest.raises(InputError) as caught:  # with a mistake beside it
        build_job(config, ["noise_std=-1"], 1)
    assert (caught.value.exit_code, len(caught.value.errors)) == (2, 2)


def test_what_keeps_coming_wrong_is_an_error(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    info = dataset.shards[3]
    served.faults[info.name].extend(["changed"] * 9)
    with pytest.raises(InputError, match=f"shards.jsonl lists {info.bytes} bytes and {info.sha256}"):
        open_shard(there(served, tmp_path), 3)
    assert served.requests[info.name] == remote.DAMAGED_ATTEMPTS
    assert kept(tmp_path, dataset) == []


def test_a_dataset_that_is_not_there_is_said_to_be_none(served: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{served.url}/nowhere: not a finished dataset"):
        open_dataset(f"{served.url}/nowhere", Cache(str(tmp_path)))


# --- ranks that share a cache ---


def ranks(url: str, folder: Path, count: int) -> list[tuple[int, str, Path]]:
    """Exit code, stderr and batches' file of so many processes that read at the same time."""
    outs = [folder / f"{rank}.npy" for rank in range(count)]
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), url, str(folder / "cache"), str(rank), str(count), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    ended = [process.communicate(timeout=patience(120))[1] for process in started]
    return [(process.returncode, err, out) for process, err, out in zip(started, ended, outs, strict=True)]


def test_two_ranks_read_from_a_bad_server_what_is_on_the_disk(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    choice = random.Random(5)
    for shard in dataset.shards:
        served.faults[shard.name].extend(choice.choices(["503", "drop", "short", "shorter", "429"], k=2))
    for code, err, _ in (ended := ranks(served.url, tmp_path, 2)):
        assert code == 0, err
    plan = plan_of(dataset)
    for rank, (_, _, out) in enumerate(ended):
        loader = Loader([dataset], plan, rank, 2, 2, workers=0)
        np.testing.assert_array_equal(np.load(out), np.concatenate([batch.concepts.numpy().copy() for batch in loader]))
    assert kept(tmp_path / "cache", dataset) == list(range(len(dataset.shards)))
    assert {served.whole[shard.name] for shard in dataset.shards} == {1}  # one download for both


def test_two_ranks_stop_where_a_shard_is_not_there(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    gone = dataset.shards[7]
    served.faults[gone.name].extend(["404"] * 20)
    ended = ranks(served.url, tmp_path, 2)
    assert {code for code, _, _ in ended} <= {0, 2}
    failed = [err for code, err, _ in ended if code == 2]
    assert failed
    assert all(f"{served.url}/{gone.name}: cannot be fetched" in err and "Traceback" not in err for err in failed)
    assert 7 not in kept(tmp_path / "cache", dataset)


def test_who_dies_fetching_is_followed_by_another(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    info = dataset.shards[2]
    left = tmp_path / f"{info.sha256}.{info.bytes}.partial"
    left.write_bytes(b"half of it")
    killed = (
        "import fcntl, time; file = open({!r}); fcntl.flock(file, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", killed.format(str(left))], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    fetched = threading.Thread(target=lambda: same(dataset, there(served, tmp_path), 2))
    fetched.start()
    time.sleep(0.5)
    assert served.requests[info.name] == 0  # it waits
    process.kill()
    process.wait()
    fetched.join(timeout=patience(20))
    assert served.whole[info.name] == 1
    assert kept(tmp_path, dataset) == [2]


def test_what_changed_in_the_cache_is_fetched_again(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    elsewhere = there(served, tmp_path)
    for damage in (lambda data: data[:900] + b"?" + data[901:], lambda data: data[:-512]):
        same(dataset, elsewhere, 1)
        path = tmp_path / f"{dataset.shards[1].sha256}.tar"
        path.write_bytes(damage(path.read_bytes()))
        os.utime(path, ns=(1, time.time_ns()))
        same(dataset, elsewhere, 1)
        assert kept(tmp_path, dataset) == [1]
    assert served.whole[dataset.shards[1].name] == 3


def test_a_shard_is_hashed_once_on_arrival_and_once_when_a_process_opens_it(
    served: Server, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, sha256 = [], OpenFile.sha256
    monkeypatch.setattr(OpenFile, "sha256", lambda file: hashed.append(file.path.suffix) or sha256(file))
    elsewhere = there(served, tmp_path)
    hashed.clear()  # that of the index
    for _ in range(3):
        open_shard(elsewhere, 5)
    assert hashed == [".partial", ".tar"]


def test_a_good_copy_is_not_forgotten_for_the_bad_one_before_it(
    served: Server, dataset: Dataset, tmp_path: Path
) -> None:
    """Two processes have seen the rotten bytes; one of them has fetched the shard again when the other takes it out."""
    elsewhere, folder_cache = there(served, tmp_path), Cache(str(tmp_path))
    rotten = elsewhere.open_file(0)
    folder_cache.invalidate(rotten)
    same(dataset, elsewhere, 0)
    folder_cache.invalidate(rotten)
    assert kept(tmp_path, dataset) == [0]
    assert served.whole[dataset.shards[0].name] == 2


def test_a_cache_of_another_users_can_be_read(served: Server, dataset: Dataset) -> None:
    if os.getuid():
        pytest.skip("needs the right to be another user")
    with tempfile.TemporaryDirectory() as folder:
        same(dataset, there(served, Path(folder)), 0)
        os.chmod(folder, 0o755)
        listed = dataset.shards[0]
        code = "import os; from lcm_ds.data.remote.cache import Cache; os.setuid(65534); "
        code += "print(len(Cache({!r}).open('', {!r}, {})))"
        call = [sys.executable, "-c", code.format(folder, listed.sha256, listed.bytes)]
        done = subprocess.run(call, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == (f"{listed.bytes}\n", "")


def test_a_loader_is_closed_at_once_in_an_outage(
    served: Server, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(dataset, rows=1)
    blocks = [plan.shards(block)[1].tolist() for block in plan.blocks(0, range(1))]
    second = blocks[1][0]
    served.faults[dataset.shards[second].name].extend(["503"] * 99)
    loader = Loader([there(served, tmp_path)], plan, 0, 1, 1, workers=1)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 30.0)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 30.0)
    batches = iter(loader)
    for _ in range(sum(dataset.shards[shard].concepts for shard in blocks[0]) // 16 - 1):
        next(batches)
    wait_until(lambda: served.requests[dataset.shards[second].name] > 0)
    time.sleep(0.3)  # the reader waits for it, too
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < patience(2)


def test_a_verification_that_is_ended_leaves_nothing_behind(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    name = dataset.shards[-1].name
    served.faults[name].append("stall")
    call = [sys.executable, "-m", "lcm_ds.cli", "inspect", served.url, "--verify"]
    process = subprocess.Popen(call, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE)
    wait_until(lambda: served.requests[name] > 0)
    assert list(tmp_path.iterdir())
    process.terminate()
    process.communicate(timeout=patience(20))
    assert (process.returncode, list(tmp_path.iterdir())) == (143, [])


# --- the bound ---


def test_what_was_not_used_for_longest_goes_first(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    limit = sum(dataset.shards[index].bytes for index in range(3)) + 1000
    elsewhere = there(served, Cache(str(tmp_path), limit))
    shards = {index: open_shard(elsewhere, index) for index in (0, 1, 2)}
    assert kept(tmp_path, dataset) == [0, 1, 2]
    shards.clear()
    open_shard(elsewhere, 0)
    open_shard(elsewhere, 3)
    assert 1 not in kept(tmp_path, dataset)
    assert {0, 3} <= set(kept(tmp_path, dataset))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= limit
    same(dataset, elsewhere, 1)


def on_disk(folder: Path) -> int:
    """Bytes of the shards in a folder: those with a name there, and those that are open here and have lost it."""
    files: dict[int, int] = {}
    names = [*folder.iterdir(), *Path("/proc/self/fd").iterdir()]
    for name in names:
        with suppress(OSError):  # they come and go
            path = str(name) if name.parent == folder else os.readlink(name)
            if path.startswith(f"{folder}/") and "index-" not in path:
                found = name.stat()
                files[found.st_ino] = found.st_size
    return sum(files.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_through_the_smallest_cache_takes_no_more_disk_than_that(
    served: Server, dataset: Dataset, tmp_path: Path, workers: int
) -> None:
    plan = plan_of(dataset, rows=4)
    largest = max(shard.bytes for shard in dataset.shards)
    limit = 2 * (2 + VALIDATION_BLOCK) * largest
    with pytest.raises(InputError, match=r"data\.cache_gb: \S+ is too little: .* at least " + f"{limit / 1e9:.4g}"):
        Loader([there(served, Cache(str(tmp_path), limit - 1))], plan, 0, 1, 2, workers)
    loader = Loader([there(served, Cache(str(tmp_path), limit))], plan, 0, 1, 2, workers)
    most = 0
    for found, expected in zip(loader, Loader([dataset], plan, 0, 1, 2, workers=0), strict=True):
        np.testing.assert_array_equal(found.concepts.numpy(), expected.concepts.numpy())
        most = max(most, on_disk(tmp_path))
    loader.close()
    assert 0.5 * limit < most <= limit
    kept(tmp_path, dataset)


def test_files_that_are_not_the_caches_own_are_left_alone(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    names = ["precious.tar", "mine.csv.partial", "0" * 64 + ".tar.gz", "f" * 63 + ".tar", "a.partial"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(200_000))
        os.utime(tmp_path / name, (1, 1))
    limit = 2 * max(shard.bytes for shard in dataset.shards)
    for index in range(4):
        open_shard(there(served, Cache(str(tmp_path), limit)), index)
    assert all((tmp_path / name).stat().st_size == 200_000 for name in names)
    assert on_disk(tmp_path) - 200_000 * len(names) <= limit


def test_what_was_fetched_ahead_is_not_taken_out_before_it_was_used(
    served: Server, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "FREE_SHARE", 2.0)  # the disk is always fuller than that allows
    loader = Loader([there(served, tmp_path)], plan_of(dataset, rows=4), 0, 1, 4, workers=2)
    for _ in loader:
        time.sleep(0.02)
    loader.close()
    assert {served.whole[shard.name] for shard in dataset.shards} == {1}
    assert len(kept(tmp_path, dataset)) < len(dataset.shards)
    assert [record.getMessage() for record in caplog.records if "fuller than" in record.getMessage()] == [
        f"{tmp_path}: its disk is fuller than -100 %: shards are kept only until they have been read"
    ]


def test_what_found_no_room_ahead_is_asked_for_again(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    plan = plan_of(dataset, rows=1, shuffle_shards=1)
    first, second = (int(plan.shards(block)[1][0]) for block in plan.blocks(0, range(1)))
    others = sorted({0, 1, 2, 3} - {first, second})[:2]
    limit = max(sum(dataset.shards[index].bytes for index in two) for two in ((first, second), others))
    elsewhere = there(served, Cache(str(tmp_path), limit))
    used = [open_shard(elsewhere, index) for index in others]
    prefetcher = ShardPrefetcher([elsewhere], plan, range(1), threading.Event())
    prefetcher.advance(0)
    wait_until(lambda: prefetcher._wanted == {(0, first): False, (0, second): False})
    used.clear()
    wanted = {f"{dataset.shards[index].sha256}.tar" for index in (first, second)}
    wait_until(lambda: prefetcher.advance(0) or {path.name for path in tmp_path.glob("*.tar")} == wanted)
    prefetcher.close()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience(10)
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def small_disk(dataset: Dataset, tmp_path: Path) -> Iterator[Path]:
    """A disk of its own that holds half the dataset."""
    folder = tmp_path / "disk"
    folder.mkdir()
    half = sum(shard.bytes for shard in dataset.shards) // 2
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={half}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("limit", [None, 10**9])
def test_an_epoch_through_a_disk_that_holds_half_of_it(
    served: Server, dataset: Dataset, small_disk: Path, limit: int | None
) -> None:
    loader = Loader([there(served, Cache(str(small_disk / "c"), limit))], plan_of(dataset, rows=2), 0, 1, 2)
    for found, expected in zip(loader, Loader([dataset], plan_of(dataset, rows=2), 0, 1, 2), strict=True):
        np.testing.assert_array_equal(found.concepts.numpy(), expected.concepts.numpy())
    loader.close()


def test_a_disk_that_fills_up_meanwhile_is_made_room_on(
    served: Server, dataset: Dataset, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said it had room, and others wrote to it."""
    elsewhere = there(served, Cache(str(small_disk / "c"), 10**9))
    for index in range(4):
        same(dataset, elsewhere, index)
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free // 4096 * 4096))
    lied = shutil.disk_usage(small_disk)._replace(free=10**9)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: lied)
    same(dataset, elsewhere, 4)
    assert 4 in kept(small_disk / "c", dataset)
    for index in range(5):
        (small_disk / "c" / f"{dataset.shards[index].sha256}.tar").unlink(missing_ok=True)
    (small_disk / "others").unlink()
    monkeypatch.undo()
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free // 4096 * 4096))
    with pytest.raises(InputError, match=r"no room for a shard of [\d,]+ bytes: data.cache_gb is 1, 0 bytes are free"):
        open_shard(elsewhere, 5)


def test_a_shard_that_does_not_fit_at_all_is_an_error(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no room for a shard of [\d,]+ bytes: data.cache_gb is 1e-06"):
        open_shard(there(served, Cache.of(tmp_path, 1e-6) or tmp_path), 0)
    assert served.requests[dataset.shards[0].name] == 0


def test_a_shard_that_is_open_is_not_taken_out(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    first, second = dataset.shards[:2]
    elsewhere = there(served, Cache(str(tmp_path), max(first.bytes, second.bytes)))
    waiting = threading.Thread(target=lambda: open_shard(elsewhere, 1))
    shard = open_shard(elsewhere, 0)
    waiting.start()
    time.sleep(0.5)
    assert shard.file.path.exists()
    assert waiting.is_alive()
    del shard
    waiting.join(timeout=patience(20))
    assert kept(tmp_path, dataset) == [1]


def test_fetching_ahead_takes_no_part_once_it_is_stopped(served: Server, dataset: Dataset, tmp_path: Path) -> None:
    served.faults[dataset.shards[0].name].extend(["503"] * 99)
    elsewhere, stopped = there(served, tmp_path), threading.Event()
    remote.FIRST_PAUSE = remote.LONGEST_PAUSE = 30.0
    ended: list[BaseException] = []

    def fetch() -> None:
        try:
            elsewhere.open_file_ahead(0, stopped)
        except remote.Stopped as error:
            ended.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    while not served.requests[dataset.shards[0].name]:
        time.sleep(0.01)
    stopped.set()
    thread.join(timeout=patience(5))
    assert len(ended) == 1
    assert kept(tmp_path, dataset) == []


def test_a_cache_that_cannot_be_written_is_named(served: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"data\.cache_dir: .*/file/cache: cannot be used: Not a directory"):
        open_shard(there(served, tmp_path / "file" / "cache"), 0)


def plan_of(dataset: Dataset, rows: int = 8, shuffle_shards: int = 2) -> Plan:
    """That of cache_worker.py has 8 rows."""
    return Plan([source_of(dataset, 16, 16, shuffle_shards=shuffle_shards)], 0, rows, 16, epochs=1)


# --- S3 ---


@pytest.fixture
def bucket(dataset: Dataset, s3: Any) -> str:
    """The dataset on a server that speaks S3."""
    client = s3.client()
    client.create_bucket(Bucket="concepts")
    for path in Path(dataset.path).iterdir():
        client.upload_file(str(path), "concepts", f"web/train/{path.name}")
    return "s3://concepts/web/train"


def test_a_dataset_on_s3_reads_like_one_on_the_disk(bucket: str, dataset: Dataset, tmp_path: Path) -> None:
    elsewhere = open_dataset(bucket, Cache(str(tmp_path)))
    assert elsewhere.fingerprint == dataset.fingerprint
    for index in range(len(dataset.shards)):
        same(dataset, elsewhere, index)
    assert kept(tmp_path, dataset) == list(range(len(dataset.shards)))


def test_what_is_not_on_s3_or_not_for_us_is_said_in_a_line(
    bucket: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    from s3fs import S3FileSystem

    elsewhere = open_dataset(bucket, Cache(str(tmp_path)))
    boto3.client("s3").delete_object(Bucket="concepts", Key=f"web/train/{dataset.shards[0].name}")
    with pytest.raises(InputError, match=f"{bucket}/{dataset.shards[0].name}: cannot be fetched"):
        open_shard(elsewhere, 0)
    with pytest.raises(InputError, match="s3://elsewhere/web: not a finished dataset"):
        open_dataset("s3://elsewhere/web", Cache(str(tmp_path)))
    S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match=f"{bucket}/dataset.json: cannot be read: .*credentials"):
        open_dataset(bucket, Cache(str(tmp_path)))
