"""Contract 1: what makes a dataset finished, its fingerprint, its normaliser, and what is said of one that is not."""

from __future__ import annotations

import fcntl
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lcm_ds.data.format import (
    Dataset,
    DatasetInfo,
    ShardInfo,
    commit,
    finish,
    open_dataset,
    read_normalizer,
    read_shards,
    write_normalizer,
)
from lcm_ds.data.index.records import INDEX, IndexWriter
from lcm_ds.data.normalizer import UniformSample, constant, fit
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.shard import open_shard, verify
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.errors import InputError

SHARDS = [ShardInfo(f"{i}.tar", documents=i, concepts=10 * i, bytes=10240, sha256="f" * 64) for i in range(4)]


def errors(path: Path | str, cache_dir: Path | None = None) -> list[str]:
    with pytest.raises(InputError) as caught:
        open_dataset(path, Cache.of(cache_dir))
    return caught.value.errors


# --- shards.jsonl ---


def test_a_committed_shard_is_listed_and_the_list_is_in_order_of_names(tmp_path: Path) -> None:
    assert read_shards(tmp_path) == []
    for shard in (SHARDS[2], SHARDS[0], SHARDS[1]):
        commit(tmp_path, shard)
    assert read_shards(tmp_path) == SHARDS[:3]


def test_a_commit_cut_off_anywhere_is_no_commit_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "shards.jsonl"
    for shard in SHARDS[:2]:
        commit(tmp_path, shard)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        assert read_shards(tmp_path) == SHARDS[:1]
        commit(tmp_path, SHARDS[3])
        assert read_shards(tmp_path) == [SHARDS[0], SHARDS[3]]


def test_commits_at_the_same_time_wait_for_one_another_and_are_all_whole(tmp_path: Path) -> None:
    shards = [replace(SHARDS[0], name=f"{i:03d}.tar") for i in range(100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shard: commit(tmp_path, shard), shards))
    assert read_shards(tmp_path) == shards
    with (tmp_path / "shards.jsonl").open("ab") as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = pool.submit(commit, tmp_path, SHARDS[3])
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        fcntl.flock(file, fcntl.LOCK_UN)
        waiting.result()
    assert SHARDS[3] in read_shards(tmp_path)


def test_a_line_that_is_not_one_of_ours_is_named_with_its_number(tmp_path: Path) -> None:
    good = SHARDS[0].line()
    bad = ['{"name": "x"', good.replace("documents", "docs"), good.replace(":0,", ":-1,", 1), good]
    (tmp_path / "shards.jsonl").write_text("\n".join([good, *bad]) + "\n")
    with pytest.raises(InputError) as caught:
        read_shards(tmp_path)
    lines = caught.value.errors
    assert [line.split(":")[0] for line in lines] == [f"{tmp_path}/shards.jsonl, line {n}" for n in (2, 3, 4, 5)]
    assert "documents" in lines[1]
    assert "docs" in lines[1]
    assert "listed twice" in lines[3]


# --- dataset.json ---


def test_a_finished_dataset_opens_with_its_totals(synthetic_dataset: Callable[..., Path]) -> None:
    dataset = open_dataset(synthetic_dataset(documents=25, documents_per_shard=10))
    assert [shard.documents for shard in dataset.shards] == [10, 10, 5]
    assert dataset.info.totals.documents == 25
    assert dataset.info.totals.concepts == sum(shard.concepts for shard in dataset.shards)
    assert dataset.info.totals.bytes == sum(Path(dataset.path, s.name).stat().st_size for s in dataset.shards)
    assert dataset.embed_dim == 16


def test_a_folder_without_dataset_json_is_not_finished(own_dataset: Path) -> None:
    (own_dataset / "dataset.json").unlink()
    assert errors(own_dataset) == [
        f"{own_dataset}: not a finished dataset (it has no dataset.json): run lcm-ds prepare again"
    ]
    assert errors(own_dataset / "nowhere") == [f"{own_dataset}/nowhere: no such dataset folder"]


def test_a_dataset_is_not_finished_without_its_normaliser(own_dataset: Path) -> None:
    (own_dataset / "normalizer.safetensors").unlink()
    (own_dataset / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"normalizer\.safetensors: no such file"):
        finish(own_dataset, DatasetInfo(encoder={}, embed_dim=16, dtype="float16"))
    assert not (own_dataset / "dataset.json").exists()


def test_every_mistake_is_reported_at_once(own_dataset: Path) -> None:
    (own_dataset / "shard-00000.tar").unlink()
    with (own_dataset / "shard-00002.tar").open("ab") as file:
        file.write(b"more")
    info = json.loads((own_dataset / "dataset.json").read_text())
    del info["encoder"]
    (own_dataset / "dataset.json").write_text(json.dumps(info | {"dtype": "int3", "embed_dims": 4}))
    write_normalizer(own_dataset, np.zeros(3), np.array([1, 0, 1]), {})
    found = errors(own_dataset)
    assert len(found) == 6
    for text in (
        f"{own_dataset}/dataset.json: encoder: is missing",
        f"{own_dataset}/dataset.json: dtype: ",
        "embed_dims: unknown key; did you mean 'embed_dim'?",
        f"{own_dataset}/shard-00000.tar: listed in shards.jsonl, cannot be read: No such file or directory",
        f"{own_dataset}/shard-00002.tar: has 30724 bytes, shards.jsonl lists 30720",
        f"{own_dataset}/normalizer.safetensors: center has to be finite, scale finite and above 0",
    ):
        assert any(text in line for line in found), text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "dataset.json: not JSON"),
        ("[]", "has to be a JSON object"),
        ('{"format_version": 2}', "format_version is 2, this version of lcm-ds reads 1"),
        ("{}", "format_version is None"),
    ],
)
def test_a_dataset_json_that_cannot_be_read_is_refused(own_dataset: Path, content: str, message: str) -> None:
    (own_dataset / "dataset.json").write_text(content)
    assert message in errors(own_dataset)[0]


def test_a_shard_list_edited_by_hand_does_not_add_up(own_dataset: Path) -> None:
    path = own_dataset / "shards.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "dataset.json counts" in errors(own_dataset)[0]


def test_a_dataset_without_concepts_is_refused(own_dataset: Path) -> None:
    (own_dataset / "shards.jsonl").write_text("")
    finish(own_dataset, DatasetInfo(encoder={}, embed_dim=16, dtype="float16"))
    assert errors(own_dataset) == [f"{own_dataset}: holds no concepts"]


def test_the_fingerprint_is_that_of_the_shards_and_not_of_their_order_or_place(own_dataset: Path) -> None:
    dataset = open_dataset(own_dataset)
    path = own_dataset / "shards.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    moved = own_dataset.rename(own_dataset.with_name("moved"))
    assert open_dataset(moved).fingerprint == dataset.fingerprint
    for change in ({"sha256": "0" * 64}, {"name": "z.tar"}, {"documents": 9}, {"concepts": 1}, {"bytes": 1}):
        other = (replace(dataset.shards[0], **change), *dataset.shards[1:])
        assert Dataset(dataset.path, dataset.info, other).fingerprint != dataset.fingerprint


# --- elsewhere ---


@pytest.fixture
def elsewhere(own_dataset: Path) -> str:
    """The dataset on a file system that only fsspec reaches."""
    url = "memory://datasets/" + own_dataset.parent.name
    files = fsspec.filesystem("memory")
    files.put(str(own_dataset), url, recursive=True)
    return url


def test_a_dataset_elsewhere_is_the_same_dataset(own_dataset: Path, elsewhere: str, tmp_path: Path) -> None:
    here, there = open_dataset(own_dataset), open_dataset(elsewhere, Cache(str(tmp_path / "cache")))
    assert there.fingerprint == here.fingerprint
    assert not (tmp_path / "cache").exists()  # a shard comes when it is first used
    for index in range(len(here.shards)):
        ours, theirs = open_shard(here, index), open_shard(there, index)
        assert theirs.keys == ours.keys
        assert all(np.array_equal(theirs.concepts(i), ours.concepts(i)) for i in range(len(ours)))
    assert sorted(path.stem for path in (tmp_path / "cache").glob("*.tar")) == sorted(s.sha256 for s in here.shards)
    fsspec.filesystem("memory").rm(elsewhere, recursive=True)
    assert open_shard(there, 0).keys == open_shard(here, 0).keys  # and stays


def test_nothing_that_came_wrong_is_kept(elsewhere: str, tmp_path: Path) -> None:
    dataset = open_dataset(elsewhere, Cache(str(tmp_path / "cache")))
    files = fsspec.filesystem("memory")
    whole = files.cat(f"{elsewhere}/shard-00001.tar")
    files.pipe(f"{elsewhere}/shard-00001.tar", whole[:1000] + b"?" + whole[1001:])
    files.pipe(f"{elsewhere}/shard-00002.tar", whole[:-512])
    files.rm(f"{elsewhere}/shard-00003.tar")
    for index, message in ((1, "and sha256"), (2, "bytes and sha256"), (3, "cannot be fetched")):
        with pytest.raises(InputError, match=message) as caught:
            open_shard(dataset, index)
        assert f"{elsewhere}/shard-0000{index}.tar" in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_dataset_elsewhere_needs_a_cache_and_a_protocol_that_is_known(elsewhere: str, tmp_path: Path) -> None:
    assert "data.cache_dir has to name a folder" in errors(elsewhere)[0]
    assert "not a finished dataset" in errors(elsewhere + "/nowhere", tmp_path)[0]
    assert "cannot be read" in errors("nosuchprotocol://host/dataset", tmp_path)[0]


def test_pipe_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    assert "is refused" in errors(f"pipe:touch {tmp_path}/ran", tmp_path)[0]
    assert not (tmp_path / "ran").exists()


# --- the normaliser ---


def test_the_normaliser_comes_back_as_written(tmp_path: Path) -> None:
    center, scale = np.array([0.1, -2.0]), np.array([1e-3, 3.0], np.float64)
    write_normalizer(tmp_path, center, scale, {"samples": 7})
    read = read_normalizer(tmp_path)
    for found, expected in zip(read, (center, scale), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected.astype(np.float32))
    (tmp_path / "normalizer.safetensors").write_bytes(b"not a normaliser")
    with pytest.raises(InputError, match="not a safetensors file"):
        read_normalizer(tmp_path)


def test_the_fit_is_median_and_interquartile_range() -> None:
    samples = np.random.default_rng(0).normal(loc=range(70), scale=np.linspace(0.1, 2, 70), size=(40_000, 70))
    center, scale = fit(samples)
    np.testing.assert_allclose(center, range(70), atol=0.06)
    np.testing.assert_allclose(scale, np.linspace(0.1, 2, 70), rtol=0.03)  # of a normal distribution: its std
    ladder = np.arange(101, dtype=np.float32).reshape(-1, 1)
    assert [float(v[0]) for v in fit(ladder)] == pytest.approx([50, 50 * 0.7413])
    outlier = np.vstack([ladder, [[1e6]] * 5])
    assert float(fit(outlier)[1][0]) < 45


def test_dimensions_without_spread_are_named() -> None:
    samples = np.random.default_rng(0).normal(size=(100, 40))
    samples[:80, [3, 37]] = 0.5
    with pytest.raises(InputError, match=r"2 of 40 dimensions .* cannot be normalised: 3, 37"):
        fit(samples)


def test_constant_dimensions_are_centred_and_not_stretched() -> None:
    samples = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float16)
    samples[:, 2] = 0.25
    samples[:, 5] = np.random.default_rng(1).choice([0, 6e-8], 1000)  # nearly 0: rounding is all that it holds
    assert constant(samples).tolist() == [2, 5]
    center, scale = fit(samples)
    assert (center[2], scale[2], scale[5]) == (0.25, 1.0, 1.0)
    assert np.abs((samples[:, [2, 5]] - center[[2, 5]]) / scale[[2, 5]]).max() < 1e-6


def test_a_uniform_sample_does_not_depend_on_the_order_of_what_is_added() -> None:
    parts = {f"shard-{i}": np.arange(1000 * i, 1000 * i + 50 * i).reshape(-1, 1) for i in range(1, 21)}
    samples = []
    for names in (list(parts), list(reversed(parts))):
        sample = UniformSample(2000, seed=1)
        for name in names:
            sample.add(name, parts[name])
        samples.append(sample.concepts())
        assert sample.count == sum(len(part) for part in parts.values())
    np.testing.assert_array_equal(*samples)
    assert len(np.unique(samples[0])) == 2000
    # Shard i gives its share of the sample, 2000 · i / 210, as far as chance allows.
    shares = np.bincount(samples[0][:, 0] // 1000, minlength=21)[1:]
    np.testing.assert_allclose(shares, 2000 * np.arange(1, 21) / 210, atol=45)
    few = UniformSample(500)
    few.add("a", np.zeros((3, 2)))
    assert few.concepts().shape == (3, 2)


def test_the_index_is_sorted_when_a_dataset_is_finished_also_after_a_kill_in_between(
    tmp_path: Path, document: Callable[..., Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = DatasetInfo(encoder={"name": "x"}, embed_dim=4, dtype="float16")
    for folder, names in (("a", "abc"), ("b", "cab")):
        (tmp_path / folder).mkdir()
        write_normalizer(tmp_path / folder, np.zeros(4), np.ones(4), {})
        for name in names:
            documents = [document(f"{name}{i}", 3 + i + ord(name) - ord("a")) for i in range(4)]
            commit(tmp_path / folder, write_shard(tmp_path / folder, f"{name}.tar", documents))
    finish(tmp_path / "a", info)
    with (tmp_path / "b" / INDEX).open("ab") as file:
        file.write(b"torn")

    def killed(writer: IndexWriter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IndexWriter, "commit", killed)
    monkeypatch.setattr(IndexWriter, "__exit__", lambda *arguments: None)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "b", info)
    monkeypatch.undo()
    finish(tmp_path / "b", info)
    for name in ("dataset.json", "shards.jsonl", INDEX):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(
        path.name for path in (tmp_path / "a").iterdir()
    )
    assert list(itertools.chain(*verify(open_dataset(tmp_path / "b")))) == []
