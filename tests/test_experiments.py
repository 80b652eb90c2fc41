"""The experiments run, at a hundredth of their size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from machine import patience

from lcm_ds.text.sample import BOOKS

ROOT = Path(__file__).parent.parent
# Of each part: all sixteen take five minutes.
POINTS = ("data-10k", "data-50k", "data-200k", "size-1m", "attention-row", "storage-float32")


@pytest.fixture
def corpus(tmp_path):
    """Beginnings of 100 chapters in the columns of the experiment; each pair of chapters is a book."""
    texts = pyarrow.parquet.read_table(BOOKS, columns=["text"]).slice(0, 100)["text"].to_pylist()
    rows = [{"id": f"c{n}", "file_path": f"Volume {n // 2}", "text": text[:3500]} for n, text in enumerate(texts)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "books-0.parquet")
    return tmp_path / "books-*.parquet"


def run(*options):
    # One thread: another file of tests has the other core.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "experiments/books.py", *map(str, options)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience(300), check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_experiment_on_books_runs_at_one_percent_and_again_does_nothing(corpus, tmp_path):
    small = ["--corpus", corpus, "--output", tmp_path / "out", "--scale", "0.01", "--steps", "3", "--processes", "1"]
    listed = run(*small, "--list")
    assert listed.returncode == 0, listed.stderr
    assert {line.split()[1] for line in listed.stdout.splitlines()[1:-1]} == {"open"}
    first = run(*small, "--only", "storage-float32", "data-50k")
    assert first.returncode == 0, first.stdout + first.stderr
    done = run(*small, "--only", *POINTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data-50k: begins" in first.stdout
    assert "data-50k: begins" not in done.stdout
    states = dict(line.split()[:2] for line in done.stdout.splitlines()[-17:-1])
    assert {name for name, state in states.items() if state == "done"} == {*POINTS}
    for name in POINTS:
        state = json.loads((tmp_path / "out/points" / f"{name}.json").read_text())
        found = json.loads(Path(state["runs"][0]["evaluation"]).read_text())
        assert found["groups"] > 1  # its intervals are by book
        assert found["scores"]["Base-LCM"]["normalised"]["mse"] > 0
    page = run(*small[2:], "--report")
    assert page.returncode == 0, page.stderr
    for heading in ("## Data", "### More data", "### Larger models", "## What the paper says", "## What storing loses"):
        assert heading in page.stdout
    for figure in ("books_data.png", "books_size.png"):
        assert (tmp_path / "out/figures" / figure).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_no_book_is_in_two_sets_and_each_training_set_begins_the_next(corpus, tmp_path):
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        from books_data import CHOOSING, VALIDATION, Corpus
    finally:
        sys.path.pop(0)
    sets = {"some": 300, "more": 900, "all": None}
    data = Corpus([str(corpus)], tmp_path / "out", sets, {CHOOSING: 200, VALIDATION: 200}, 0.2)
    data.prepare()
    chosen = {name: data.chosen(name) for name in (*sets, CHOOSING, VALIDATION)}
    books = {name: {entry.group for entry in entries} for name, entries in chosen.items()}
    for one, other in (("all", CHOOSING), ("all", VALIDATION), (CHOOSING, VALIDATION)):
        assert not books[one] & books[other]
        assert books[one]
        assert books[other]
    assert chosen["more"][: len(chosen["some"])] == chosen["some"]
    assert chosen["all"][: len(chosen["more"])] == chosen["more"]
    assert 300 <= sum(entry.concepts for entry in chosen["some"]) < 400


def test_a_mistake_is_one_line(tmp_path):
    done = run("--output", tmp_path / "out", "--only", "data-10m")
    assert (done.returncode, done.stderr) == (2, "--only data-10m: no such point; --list prints them\n")
    done = run("--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (2, "--corpus: name the parquet files of the corpus\n")
