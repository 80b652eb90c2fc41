"""What a preparation does at the limits of disk, memory and patience: it says so, and loses nothing."""

import json
import re
import subprocess
import sys
import time

import pytest
import yaml
from preparing import HashEncoder, written
from runs import SUPPORT

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import open_dataset
from lcm_ds.errors import InputError
from lcm_ds.prepare import committer
from lcm_ds.prepare.coordinator import _FAILURE as FAILURE
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.pipeline import prepare

SCRIPT = SUPPORT / "preparing.py"


def write_lines(path, count, sentences=5, broken=()):
    """JSONL of `count` documents; those in `broken` hold a sentence that cannot be encoded."""
    with path.open("w") as file:
        for n in range(count):
            words = [f"Sentence {k} of document {n} is no other's." for k in range(sentences)]
            file.write(
                json.dumps({"id": str(n), "text": " ".join(words) + " This is not a text." * (n in broken)}) + "\n"
            )
    return path


def config_of(path, output, **changes):
    return PrepareConfig(
        **{
            "output": str(output),
            "source": {"name": "huggingface", "paths": [str(path)]},
            "encoder": {"name": "sentence-transformers", "model": "minilm"},
            "documents_per_shard": 20,
            "validation": 0.1,
            "split_workers": 0,
            **changes,
        }
    )


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_what_stops_the_committer_is_the_error_of_the_preparation(tmp_path, monkeypatch):
    """Also if the encoding thread learns of it first, as of the failure of another rank."""
    claimed, failure = Coordinator.claim, "the disk is full"

    def commit(folder, shard):
        raise InputError(failure)

    def claim(coordinator):
        index = claimed(coordinator)
        while index > 3 and not coordinator._store.check([FAILURE]):
            time.sleep(0.01)
        return index if index <= 3 else claimed(coordinator)

    monkeypatch.setattr(committer, "commit", commit)
    monkeypatch.setattr(Coordinator, "claim", claim)
    with pytest.raises(InputError, match=failure):
        prepare(config_of(write_lines(tmp_path / "lines.jsonl", 400), tmp_path / "out"), HashEncoder())


def test_a_full_disk_stops_with_one_line_and_leaves_only_committed_shards(small_disk, tmp_path):
    lines = write_lines(tmp_path / "lines.jsonl", 400)
    prepare(config_of(lines, tmp_path / "uninterrupted"), HashEncoder())
    config = config_of(lines, small_disk / "out", check_space=False)
    with pytest.raises(InputError, match=r"the disk is full .*: committed units are kept; make room"):
        prepare(config, HashEncoder(0.005))  # so that some units are committed before the disk is full
    done = len((small_disk / "out/units.jsonl").read_text().splitlines())
    assert 0 < done < 20
    for split in ("train", "validation"):
        folder = small_disk / "out" / split
        listed = {json.loads(line)["name"] for line in (folder / "shards.jsonl").read_text().splitlines()}
        assert {path.name for path in folder.glob("*.tar*")} == listed
        assert not (folder / "dataset.json").exists()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    encoder = HashEncoder()
    prepare(config, encoder)
    assert 0 < len(encoder.seen) < 400 * 5
    assert written(small_disk / "out") == written(tmp_path / "uninterrupted")


def test_what_will_not_fit_is_refused_before_anything_is_encoded(small_disk, tmp_path):
    lines = write_lines(tmp_path / "lines.jsonl", 4000)
    encoder = HashEncoder()
    with pytest.raises(InputError, match=r"takes about 0\.001\d* GB, 0\.00026\d* GB are free.*check_space=false"):
        prepare(config_of(lines, small_disk / "out"), encoder)
    assert encoder.seen == ["End of text."]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path):
    peaks = {}
    for count in (400, 4000):
        lines = write_lines(tmp_path / f"{count}.jsonl", count, sentences=40)
        config = config_of(lines, tmp_path / str(count), normalizer_samples=1000)
        path = tmp_path / f"{count}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        done = subprocess.run([sys.executable, SCRIPT, path, "0"], capture_output=True, text=True, check=True)
        peaks[count] = int(re.search(r"peak (\d+) KiB", done.stdout)[1])
        assert open_dataset(tmp_path / str(count) / "train").info.source["given"] == count
    assert peaks[4000] < 1.1 * peaks[400], peaks


def test_a_document_that_cannot_be_encoded_is_named_and_the_others_are_kept(tmp_path, capsys):
    lines = write_lines(tmp_path / "lines.jsonl", 100, broken=(33,))
    prepare(config_of(lines, tmp_path / "out"), HashEncoder())
    assert "not encoded: document 33: ValueError: this is not a text" in capsys.readouterr().out
    source = open_dataset(tmp_path / "out/train").info.source
    assert source["refused"] == {"not_encoded": 1}
    assert sum(source["kept"].values()) == 99


def test_too_many_documents_that_cannot_be_encoded_stop_the_run(tmp_path):
    lines = write_lines(tmp_path / "lines.jsonl", 100, broken=range(40, 60, 3))
    config = config_of(lines, tmp_path / "out", max_refused=0.05)
    with pytest.raises(
        InputError, match=r"7 of 100 documents could not be read or encoded.*max_refused 0\.05.*document 40:"
    ):
        prepare(config, HashEncoder())
    assert len((tmp_path / "out/units.jsonl").read_text().splitlines()) == 2  # those before
    # It is a matter of patience, not of the dataset: more of it, and the same folder goes on.
    prepare(config.model_copy(update={"max_refused": 0.1}), HashEncoder())
    assert open_dataset(tmp_path / "out/train").info.source["refused"] == {"not_encoded": 7}


def test_rows_that_cannot_be_read_are_refused_and_too_many_of_them_stop_it_without_loss(tmp_path, capsys):
    lines = write_lines(tmp_path / "lines.jsonl", 100)
    rows = lines.read_text().splitlines()
    rows[70] = rows[70][:30]
    lines.write_text("\n".join(rows) + "\n\n")
    prepare(config_of(lines, tmp_path / "one"), HashEncoder())
    assert "not read: lines.jsonl: line 71: not JSON: Unterminated string" in capsys.readouterr().out
    source = open_dataset(tmp_path / "one/train").info.source
    assert (source["given"], source["refused"], sum(source["kept"].values())) == (100, {"unreadable": 1}, 99)
    rows[80], rows[90] = "[]", "{}"
    lines.write_text("\n".join(rows) + "\n\n")
    config = config_of(lines, tmp_path / "out")
    with pytest.raises(InputError, match=r"3 of 100 .* could not be read or encoded.* line 71: .*; .* line 81: "):
        prepare(config, HashEncoder())
    # A user who repairs the file learns that the source has changed, and what to do.
    original = lines.read_bytes()
    lines.write_bytes(original.rstrip())
    with pytest.raises(
        InputError, match=r"lines\.jsonl: has \d+ bytes, but had \d+ when .*/out was started: restore it"
    ):
        prepare(config, HashEncoder())
    lines.write_bytes(original)
    encoder = HashEncoder()
    prepare(config.model_copy(update={"max_refused": 0.05}), encoder)
    assert len(encoder.seen) == 1 + 5 * (20 - 2)  # the end of text, and the last of five units
    assert open_dataset(tmp_path / "out/train").info.source["refused"] == {"unreadable": 3}


def test_a_batch_that_the_device_cannot_hold_is_a_mistake_in_the_config(tmp_path):
    import torch

    class Small(HashEncoder):
        def embed(self, batch):
            if len(batch.rows) == 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().embed(batch)

    lines = write_lines(tmp_path / "lines.jsonl", 10)
    with pytest.raises(InputError, match=r"encoder\.tokens_per_batch: a batch of 5 tokens"):
        prepare(config_of(lines, tmp_path / "out"), Small())


def test_splitting_in_processes_gives_what_splitting_in_a_thread_gives(tmp_path):
    lines = write_lines(tmp_path / "lines.jsonl", 100)
    prepare(config_of(lines, tmp_path / "thread"), HashEncoder())
    prepare(config_of(lines, tmp_path / "processes", split_workers=2), HashEncoder())
    assert written(tmp_path / "processes") == written(tmp_path / "thread")
