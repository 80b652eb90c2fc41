"""File systems of clusters and buckets that lack an operation: noticed before the first step, or done without."""

import copy
import errno
import os
import shutil
import subprocess
import sys

import pytest
from runs import ROOT, SUPPORT, write_tiny_config

from lcm_ds.files import OpenFile, why_no_checkpoints

COMMIT = """
import logging, sys
from dataclasses import replace
from pathlib import Path
from lcm_ds.data.format import commit, read_shards
from lcm_ds.files import write_whole
from lcm_ds.prepare.state import locked
source, out = Path(sys.argv[1]), Path(sys.argv[2])
with locked(out):
    for shard in read_shards(source):
        commit(out, shard)
    write_whole(out / "done", "yes")
assert len(read_shards(out)) == len(read_shards(source)) > 1
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The library that takes operations away (file_system.c)."""
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = str(SUPPORT / "file_system.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    return library


def run(shim, folder, lacks, *command):
    """A Python command under a file system that lacks these operations below `folder`."""
    variables = {"LD_PRELOAD": str(shim), "SHIM_FOLDER": str(folder), "SHIM_LACKS": lacks, "DS_ACCELERATOR": "cpu"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.ENOTSUP])
def test_a_preparation_commits_without_locks_and_warns_once(shim, synthetic_dataset, tmp_path, number):
    done = run(shim, tmp_path, f"flock={number}", "-c", COMMIT, synthetic_dataset(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be locked") == len(done.stderr.splitlines()) == 1


def test_folders_that_cannot_be_synced_are_warned_of_once(shim, synthetic_dataset, tmp_path):
    done = run(shim, tmp_path, "fsync-folder", "-c", COMMIT, synthetic_dataset(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot sync folders") == len(done.stderr.splitlines()) == 1


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    from lcm_ds.files import write_whole

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_whole(tmp_path / "file", "text")


@pytest.mark.slow
def test_training_goes_on_without_locks_synced_folders_and_hard_links(shim, synthetic_dataset, tmp_path):
    lacks = f"flock={errno.ENOLCK},fsync-folder,link"
    config = write_tiny_config(synthetic_dataset(), tmp_path)
    launch = ("-m", "lcm_ds.cli", "launch", "--local", 1, config)
    done = run(shim, tmp_path, lacks, *launch)
    assert done.returncode == 0, done.stdout + done.stderr
    # resumed under another stage, for which the converted checkpoint has its files under two names
    done = run(shim, tmp_path, lacks, *launch, "steps=3", f"deepspeed={ROOT}/ds_configs/zero3_fp32.json")
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "run/log.txt").read_text()
    for warning in ("cannot be locked", "cannot sync folders"):
        assert log.count(warning) == 2  # once a process
    assert (tmp_path / "run/checkpoints/step_00000003/COMPLETE").exists()


def test_folders_that_cannot_be_renamed_are_found_before_the_first_step(shim, synthetic_dataset, tmp_path):
    config = write_tiny_config(synthetic_dataset(), tmp_path)
    reason = "its file system cannot rename folders (Function not implemented), which checkpoints need"
    for command in (("launch", "--local", 1), ("doctor",)):
        done = run(shim, tmp_path, "rename-folder", "-m", "lcm_ds.cli", *command, config)
        assert done.returncode == 2, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert reason in line
        assert "loss" not in done.stdout
    assert not list(tmp_path.rglob("trial*"))


def test_a_folder_that_can_hold_checkpoints_is_left_as_it_was(tmp_path):
    assert why_no_checkpoints(tmp_path) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert "cannot make folders (Not a directory)" in why_no_checkpoints(tmp_path / "file")


def test_stale_handles_are_opened_again(shim, synthetic_dataset, tmp_path):
    dataset = shutil.copytree(synthetic_dataset(), tmp_path / "dataset")
    config = write_tiny_config(dataset, tmp_path)
    done = run(shim, dataset, "stale", "-m", "lcm_ds.cli", "launch", "--local", 1, config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/log.txt").read_text().count("stale file handle") == 1


def test_an_open_file_is_not_copied(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.copy(OpenFile(tmp_path / "file"))


def test_a_file_of_another_size_does_not_take_the_place_of_a_stale_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"first")
    file, pread = OpenFile(tmp_path / "file"), os.pread
    answers = [OSError(errno.ESTALE, "Stale file handle")]

    def stale_once(*arguments):
        if answers:
            raise answers.pop()
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", stale_once)
    (tmp_path / "file").unlink()
    (tmp_path / "file").write_bytes(b"other")
    assert file[0:5] == b"other"
    answers.append(OSError(errno.ESTALE, "Stale file handle"))
    (tmp_path / "file").unlink()
    (tmp_path / "file").write_bytes(b"longer than before")
    with pytest.raises(OSError, match="another size"):
        file[0:5]
