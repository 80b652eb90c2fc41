"""Many ranks make the dataset that one makes, whatever happens to them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from machine import patience
from preparing import HashEncoder, written
from runs import SUPPORT

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import open_dataset
from lcm_ds.distributed import rendezvous
from lcm_ds.distributed.environment import free_port
from lcm_ds.errors import TransientError
from lcm_ds.prepare import coordinator
from lcm_ds.prepare.pipeline import prepare

SCRIPT = SUPPORT / "preparing.py"
PROSE = "The {0} mill stood at the {1} river. Nobody had seen it turn for {0} years! Was the {1} water too low? It was."
WORDS = ["old", "grey", "quiet", "distant", "broken", "wooden", "narrow", "shallow", "frozen", "empty", "golden"]


def story(number):
    """A few English sentences, some of which other stories have, too."""
    draw = random.Random(number)
    return " ".join(PROSE.format(*draw.sample(WORDS, 2)) for _ in range(draw.randint(1, 4)))


@pytest.fixture(scope="session")
def lines(tmp_path_factory):
    """JSONL of 48 documents; three ids come again later, one of them twice, one in the same unit."""
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    again = {20: 3, 33: 3, 41: 40, 47: 19}
    rows = [{"id": f"story-{again.get(n, n)}", "text": f"Story {n} begins. {story(n)}"} for n in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def write_config(lines, tmp_path):
    def write(output, **changes):
        mapping = {
            "output": str(tmp_path / output),
            "source": {"name": "huggingface", "paths": [str(lines)]},
            "encoder": {"name": "sentence-transformers", "model": "minilm"},
            "documents_per_shard": 4,
            "validation": 0.2,
            "split_workers": 0,
            **changes,
        }
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(mapping))
        return path

    return write


def config_at(path):
    return PrepareConfig(**yaml.safe_load(path.read_text()))


def launcher(ranks, command, **environ):
    """A process that starts `command` in so many ranks and ends with their exit code."""
    code = f"import sys; from lcm_ds.distributed.workers import run_local; sys.exit(run_local({command!r}, {ranks}))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **pipes, env={**os.environ, **environ})


def hashing(config, seconds=0.0):
    return [sys.executable, str(SCRIPT), str(config), str(seconds)]


def test_three_ranks_make_what_one_makes_and_each_makes_some(write_config, tmp_path):
    one = write_config("one")
    prepare(config_at(one), HashEncoder())
    process = launcher(3, hashing(write_config("three", split_workers=1), 0.1))
    out, errors = process.communicate(timeout=patience(120))
    assert process.returncode == 0, errors
    assert "in 3 processes" in out
    assert written(tmp_path / "three") == written(tmp_path / "one")
    encoded = dict(re.findall(r"^rank (\d) encoded (\d+) sentences", out, re.MULTILINE))
    assert set(encoded) == {"0", "1", "2"}
    assert all(int(count) > 1 for count in encoded.values()), out  # each has encoded the end-of-text in any case


def test_an_id_that_comes_again_in_another_unit_is_kept_where_it_comes_first(write_config, tmp_path):
    prepare(config_at(write_config("out", validation=0.4)), HashEncoder())
    found = {}
    for split in ("train", "validation"):
        dataset = open_dataset(tmp_path / "out" / split)
        assert dataset.info.source["refused"] == {"duplicate_id": 4}
        assert dataset.info.source["kept"][split] == dataset.info.totals.documents
        for shard in sorted((tmp_path / "out" / split).glob("*.tar")):
            for meta in metas(shard):
                assert meta["id"] not in found
                found[meta["id"]] = meta["sentences"][0]
    assert len(found) == 44
    assert all(first == f"Story {id.removeprefix('story-')} begins." for id, first in found.items())


def metas(shard):
    import tarfile

    with tarfile.open(shard) as tar:
        return [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]


def units_done(folder):
    path = folder / "units.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill(process, moment):
    """SIGKILL a launcher after a moment: its ranks end by themselves."""
    time.sleep(moment)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    psutil.wait_procs(ranks, timeout=patience(10))
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


@pytest.mark.slow
def test_killed_at_six_random_moments_the_dataset_is_that_of_one_run(write_config, tmp_path):
    prepare(config_at(write_config("uninterrupted")), HashEncoder())
    config, out = write_config("killed"), tmp_path / "killed"
    draw = random.Random(5)
    # Moments are counted in units of the twelve, so that they are the same on a machine of any speed.
    for units in (0, 2, 4, 0, 6, 8):
        process = launcher(2, hashing(config, 0.12))
        wait_for(lambda units=units: units_done(out) >= units)
        kill(process, draw.uniform(0, 0.2 if units else 2.0))  # while units are encoded, or during the start
    assert units_done(out) >= 8
    process = launcher(2, hashing(config))
    said, errors = process.communicate(timeout=patience(120))
    assert process.returncode == 0, errors
    # The last one killed may have finished the dataset, and not yet ended.
    assert "resuming after" in said or "already prepared" in said
    assert written(out) == written(tmp_path / "uninterrupted")


def test_the_datasets_are_there_when_prepare_returns_on_any_rank(write_config):
    """Also the second time in the same processes."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from preparing import HashEncoder; from lcm_ds import api\n"
    code += "from lcm_ds.prepare import texts; texts.load_encoder = lambda config: HashEncoder()\n"
    code += (
        "for path in sys.argv[2:]: print(api.prepare(api.load(api.PrepareConfig, path)).train.info.totals.documents)"
    )
    configs = [str(write_config(output)) for output in ("first", "second")]
    process = launcher(2, [sys.executable, "-c", code, str(SCRIPT.parent), *configs])
    out, errors = process.communicate(timeout=patience(120))
    assert process.returncode == 0, errors
    counts = [line for line in out.splitlines() if line.isdigit()]
    assert len(counts) == 4
    assert len(set(counts)) == 1


@pytest.mark.slow
def test_a_mistake_that_one_rank_finds_is_told_once_and_ends_all_with_2(write_config, tmp_path, lines):
    broken = tmp_path / "broken.parquet"
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines.read_text().splitlines()])
    pyarrow.parquet.write_table(table, broken, row_group_size=4)
    pages = pyarrow.parquet.read_metadata(broken).row_group(7).column(1).dictionary_page_offset
    data = bytearray(broken.read_bytes())
    data[pages : pages + 40] = bytes(40)
    broken.write_bytes(data)
    config = write_config("out", source={"name": "huggingface", "paths": [str(broken)]})
    process = launcher(3, [sys.executable, "-m", "lcm_ds.prepare", str(config)])
    _, errors = process.communicate(timeout=patience(120))
    assert process.returncode == 2, errors
    assert len(errors.splitlines()) == 1, errors
    assert "broken.parquet: cannot be read" in errors


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_what_is_committed_stays(write_config, tmp_path):
    config = write_config("out")
    process = launcher(2, hashing(config, 0.3))
    wait_for(lambda: units_done(tmp_path / "out") >= 3)
    ranks = [child for child in psutil.Process(process.pid).children() if str(SCRIPT) in " ".join(child.cmdline())]
    ranks[1].kill()
    _, errors = process.communicate(timeout=patience(60))
    assert process.returncode == 1
    assert "SIGKILL" in errors
    assert not any(rank.is_running() for rank in ranks)
    process = launcher(2, hashing(config))
    out, errors = process.communicate(timeout=patience(120))
    assert process.returncode == 0, errors
    assert "resuming after" in out


def test_a_rank_that_never_comes_is_named_and_ends_it(write_config, tmp_path, monkeypatch, capsys):
    """RANK and WORLD_SIZE left behind in a notebook's environment."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rendezvous, "REMINDER_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(coordinator, "SHUTDOWN_SECONDS", 0.1)
    config = config_at(write_config("out"))
    with pytest.raises(
        TransientError, match=r"rank 1 of 2 \(WORLD_SIZE=2 in the environment\) did not come in .* unset RANK"
    ):
        prepare(config, HashEncoder())
    assert "waiting for rank 1 of 2 (WORLD_SIZE=2 in the environment), " in capsys.readouterr().out
    assert len((tmp_path / "out/units.jsonl").read_text().splitlines()) == 12  # nothing of it is lost
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(TransientError, match=r"rank 0 of 2 .* at 127\.0\.0\.1:\d+ did not come in"):
        prepare(config, HashEncoder())
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    prepare(config.model_copy(update={"processes": 1}), HashEncoder())
    assert "resuming after 48 documents" in capsys.readouterr().out


def wait_for(true, seconds=60):
    deadline = time.monotonic() + patience(seconds)
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def run(*words):
    command = [sys.executable, "-m", "lcm_ds.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience(300))


@pytest.mark.slow
def test_a_real_encoder_in_one_and_in_three_processes_makes_shards_with_the_same_checksums(write_config, tmp_path):
    for processes in (1, 3):
        config = write_config(f"out-{processes}", split_workers=1)
        done = run("prepare", config, f"processes={processes}")
        assert done.returncode == 0, done.stderr
        assert re.search(r"padding [\d.]+% of [\d,]+ tokens; encoder busy \d+% of the time", done.stdout)
    assert written(tmp_path / "out-3") == written(tmp_path / "out-1")
    assert open_dataset(tmp_path / "out-3/train").info.encoder["model"] == "minilm"
    # Launched, it is the same command in every rank.
    done = run("launch", "--local", "2", write_config("launched"))
    assert done.returncode == 0, done.stderr
    assert "in 2 processes" in done.stdout
    assert written(tmp_path / "launched") == written(tmp_path / "out-1")
    done = run("launch", "--local", "2", tmp_path / "launched.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already prepared") == 1


@pytest.mark.slow
def test_a_process_of_prepare_that_dies_ends_it_with_1_and_a_request_to_stop_with_75(write_config, tmp_path):
    config = write_config("out", source={"name": "sample", "take_sentences": 4000})
    command = [sys.executable, "-m", "lcm_ds.cli", "prepare", str(config), "processes=2"]
    units = tmp_path / "out/units.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(psutil.Process(process.pid).children()) == 1)
    child = psutil.Process(process.pid).children()[0]
    child.kill()
    _, errors = process.communicate(timeout=patience(60))
    assert process.returncode == 1
    assert f"process {child.pid} of the preparation was killed by SIGKILL" in errors
    assert not [word for word in ("Traceback", "leaked", "resource_tracker") if word in errors], errors
    before = units.read_text() if units.exists() else ""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: units.exists() and len(units.read_text()) > len(before))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=patience(60))
    assert process.returncode == 75
    assert "start again to resume" in errors
    assert not [word for word in ("Traceback", "leaked", "resource_tracker") if word in errors], errors
