"""Plans of preparations: what they take, from the config and the source, or without the source."""

import math
import os
import subprocess
import sys

import pytest
from machine import patience
from runs import ROOT

from lcm_ds.prepare import progress
from lcm_ds.prepare.progress import Progress

FINEWEB = "configs/prepare/fineweb_edu_10bt.yaml"


@pytest.fixture
def plan(call):
    """plan(*arguments) -> the lines of a dry run by their names."""

    def plan(*arguments):
        code, out, err = call("prepare", *arguments, "--dry-run")
        assert code == 0, err
        return dict(line.split(maxsplit=1) for line in out.splitlines())

    return plan


def test_a_plan_of_a_source_that_is_here_counts_its_characters(plan, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text("x" * 9200)
    source = (f"source.paths=[{tmp_path}/texts/*.txt]", f"output={tmp_path}/out", "documents_per_shard=4")
    lines = plan("configs/prepare/text_files.yaml", *source, "--rate", 10, "--ranks", 2, "--price-per-gpu-hour", 3)
    assert lines["documents"] == "6, 600 sentences (the source's 55,200 characters, 92 to a sentence)"
    hours = 600 / 10 / 3600
    assert lines["hours"].startswith(f"{hours / 2:.3g} on 2; {hours:.3g} GPU-hours: ")
    assert lines["cost"].startswith(f"{3 * hours:.3g}: ")
    assert lines["disk"].startswith(f"{600 * (2 * 384 + 92) / 1e6:.3g} MB: 384 numbers in float16")
    assert lines["shards"].startswith("2 for training")
    assert not (tmp_path / "out").exists()
    assert plan("configs/prepare/text_files.yaml", *source, "source.take=2")["documents"].startswith("2, 200 sentences")


def test_a_wrong_column_of_a_source_that_is_here_is_an_error_and_not_a_missing_source(call, plan, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "text": "One. Two.", "score": 3}\n')
    table = ("configs/prepare/table.yaml", f"source.paths={path}", f"output={tmp_path / 'out'}")
    code, out, err = call("prepare", *table, "source.filter={scores: {min: 3}}", "--dry-run")
    assert (code, out) == (2, "")
    assert "has no column 'scores'" in err
    counted = plan(*table, "source.filter={score: {min: 3}}")["documents"]
    assert counted.endswith(" characters, 92 to a sentence, before source.filter)")
    gone = plan(*table, f"source.paths={tmp_path / 'gone.jsonl'}")["source"]
    assert gone.startswith("not there yet: ")


def test_a_plan_without_the_source_takes_its_size_and_needs_no_torch():
    command = ["prepare", FINEWEB, "--dry-run", "--documents", "9672101", "--rate", "5k", "dtype=int8"]
    code = (
        "import sys; from lcm_ds.cli import main; assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'transformers', 'spacy', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, timeout=patience(3)
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    sentences = 9_672_101 * 4753 / 92  # FineWeb-Edu's means
    assert lines["documents"].startswith(f"9,672,101, {sentences:,.0f} sentences (--documents, ")
    assert lines["hours"].startswith(f"{sentences / 5000 / 3600:.3g} on 1; ")
    assert lines["disk"].startswith(f"{sentences * (1024 + 92) / 1e9:,.0f} GB: 1024 numbers in int8")
    assert lines["shards"].startswith(f"{math.ceil(9_672_101 / 1000):,} for training")


@pytest.mark.parametrize(
    ("written", "number"),
    [("500M", 500_000_000), ("1.5G", 1_500_000_000), ("57B", 57_000_000_000), ("9,672,101", 9_672_101), ("2k", 2000)],
)
def test_numbers_of_plans_have_the_usual_suffixes(plan, written, number):
    assert f" {number:,} sentences" in plan(FINEWEB, "--sentences", written)["documents"]


@pytest.mark.parametrize("written", ["0", "-1", "many", "1.2.3", "5X", ""])
def test_what_is_no_number_is_refused(call, written):
    with pytest.raises(SystemExit):
        call("prepare", FINEWEB, "--dry-run", f"--rate={written}")


def test_what_is_given_is_limited_to_what_is_taken(plan):
    assert plan(FINEWEB, "source.take=1000", "--documents", "1M", "--sentences", "50M")["documents"].startswith(
        "1,000, 50,000 sentences"
    )
    assert plan(FINEWEB, "--sentences", "92M")["documents"].startswith(f"{92e6 * 92 / 4753:,.0f}, 92,000,000 sentences")


def test_a_source_that_cannot_be_read_is_not_there_yet_and_the_rest_is_printed(plan, tmp_path):
    lines = plan("configs/prepare/text_files.yaml", f"source.paths=[{tmp_path}/none/*.txt]", "--rate", 10)
    assert lines["source"].startswith("not there yet: ")
    assert lines["sentences"].startswith("not known: --documents N")
    assert lines["rate"].startswith("10 sentences/s")
    assert plan(FINEWEB, "--sentences", 1800, "--rate", 0.5)["hours"].startswith("1 on 1; ")
    assert {"hours", "disk", "shards"}.isdisjoint(lines)
    other = ("encoder.model=other/model", "--sentences", 1000)
    assert plan("configs/prepare/text_files.yaml", *other)["disk"].startswith("not known: --embed-dim D")
    assert "768 numbers" in plan("configs/prepare/text_files.yaml", *other, "--embed-dim", 768)["disk"]


def test_options_of_plans_are_refused_where_they_mean_nothing(call):
    def refused(*arguments):
        code, out, err = call("prepare", *arguments)
        assert (code, out) == (2, "")
        return err.splitlines()

    assert refused(FINEWEB, "--rate", 5) == ["--rate: goes with --dry-run"]
    assert refused(FINEWEB, "--ranks", 5) == ["--ranks 5: has to be 1 or more, and goes with --dry-run"]
    assert refused(FINEWEB, "--dry-run", "--rate", 5, "--measure", "1s", "--price-per-gpu-hour", -1) == [
        "--rate, --measure: give only one of them",
        "--price-per-gpu-hour -1: has to be more than 0",
    ]
    (line,) = refused("configs/prepare/adopt.yaml", "--dry-run")
    assert "concepts that exist are not encoded" in line


@pytest.mark.parametrize("there", [True, False])
def test_the_rate_is_measured_on_the_source_or_on_the_sample_text(plan, tiny_sonar, tmp_path, there):
    if there:
        (tmp_path / "a.txt").write_text("This is a sentence. Here is the next one. " * 50)
    settings = ("encoder.name=sonar", f"encoder.model={tiny_sonar[0]}", f"source.paths=[{tmp_path}/*.txt]")
    settings += ("min_sentences=1", "--sentences", 1000)
    lines = plan("configs/prepare/text_files.yaml", *settings, "--measure", "0.2s")
    rate, rest = lines["rate"].split(" ", 1)
    assert float(rate.replace(",", "")) > 0
    assert ("of the source in" if there else "of the sample text, as the source cannot be read in") in rest
    seconds = float(rest.rpartition(" in ")[2].removesuffix(" s)"))
    assert 0.1 < seconds < patience(20)
    assert float(lines["hours"].split()[0]) == pytest.approx(1000 / float(rate.replace(",", "")) / 3600, rel=0.02)
    assert not lines["disk"].startswith("384")  # that of the model, which is loaded


def test_the_first_line_comes_before_torch_is_imported_and_the_phases_have_names(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    command = [sys.executable, "-u", "-m", "lcm_ds.cli", "prepare", "configs/prepare/quickstart.yaml", "output=out"]
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=patience(60))
    assert done.stdout == "out: start-up: sentence-transformers minilm, source sample\n"
    assert "no torch here" in done.stderr


def test_speed_and_time_left_do_not_count_the_start_up(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(total=40, given=10, ranks=1, started=0.0) as shown:
        now = 160.0
        shown.add(10)
        shown.show([{"sentences": 600.0}])
    # 10 documents a minute, 20 left; the start took 100 s
    assert capsys.readouterr().out == "20 documents of 40 (50%), 10 sentences/s, 0:02:00 left\n"
