"""The console shows our lines, in columns, and no output of libraries, compilers and C++."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from machine import patience
from runs import ROOT, finish, run_dir, start

from lcm_ds.train.monitoring.console_format import progress_bar, step_line, summary, validation_line

STEP = r"step +\d+/\d+  loss +\S+  lr \S+  grad norm +\S+ +\S+ concepts/s  eta +\S+"
LINES = [
    r"\S+: starting 2 workers; log: \S+/log\.txt",
    r"\S+: [\d,]+ parameters, 2 rank\(s\), ZeRO \d, \w+",
    r"data: \S+ \([\d,]+ concepts, \d+ of \d+ rows of a step\)",
    r"step 0 of \d+, \d+ rows of \d+ concepts per step",
    r"total: [\d,]+ concepts, \d+\.\d\d epochs; warm-up \d+ steps, \S+% of the run",
    STEP,
    r"step +\d+/\d+  validation loss +\S+(  mean of targets \S+)?(  copy \S+)?(  ridge \S+)?  cosine \S+",
    r"done: \d+ steps, [\d,]+ concepts; \S+",
    r"  (time|speed|validation|next|    ) +\S.*",
]


def of_ours(line):
    return any(re.fullmatch(pattern, line) for pattern in LINES)


def test_lines_of_steps_have_the_same_columns():
    values = {"loss": 0.98765, "lr": 1e-4, "grad_norm": 12.5, "concepts_per_second": 45_000.4, "mfu": 0.4512}
    lines = [
        step_line(5, 2000, {**values, "step_time": 0.25}),
        step_line(
            2000, 2000, {**values, "loss": 12.5, "grad_norm": None, "concepts_per_second": 1_234_567, "step_time": 9}
        ),
    ]
    assert lines[0] == (
        "step    5/2000  loss  0.9877  lr 1.00e-04  grad norm   12.500     45,000 concepts/s  mfu 45.1%  eta  0:08:19"
    )
    lines.append(step_line(300, 2000, {**values, "loss": None, "step_time": 0.25}))
    assert "  loss       –  lr" in lines[2]
    columns = [[line.index(word) for word in ("loss", "lr", "grad", "concepts/s", "mfu", "eta")] for line in lines]
    assert columns[0] == columns[1] == columns[2]
    assert len(set(map(len, lines))) == 1


def test_a_validation_is_shown_with_its_baselines():
    values = {"val_loss": 0.8, "val_cosine": 0.35}
    assert validation_line(50, 200, values) == "step  50/200  validation loss  0.8000  cosine 0.3500"
    nothing = {"val_loss": None, "val_cosine": None}
    assert validation_line(50, 200, nothing) == "step  50/200  validation loss       –  cosine      –"
    both = {**values, "val_loss_of_mean": 0.98, "val_loss_of_copy": 1.35, "val_loss_of_ridge": 0.81}
    assert (
        validation_line(50, 200, both)
        == "step  50/200  validation loss  0.8000  mean of targets 0.9800  copy 1.3500  ridge 0.8100  cosine 0.3500"
    )


def test_the_summary_names_the_best_validation_and_what_comes_next(tmp_path):
    speed = {"concepts_per_second": 1234.5, "mfu": None}
    text = "\n".join(summary(tmp_path, speed, 3661, {50: 0.9, 100: 0.7, 150: 0.8}))
    for expected in (
        "1:01:01",
        "1,234 concepts/s",
        "0.8000 at step 150",
        "best 0.7000 at step 100",
        f"evaluate {tmp_path}",
    ):
        assert expected in text


def test_the_bar_shows_the_share_of_steps_done():
    assert progress_bar(50, 200, 75).startswith("━" * 8 + "╌" * 22 + " 50 of 200 steps (25%)  0:01:15 left")


SPEAKER = """
import os, sys, warnings
from lcm_ds.train.monitoring.console import console
print("before")
console.redirect()
os.write(1, b"from C\\n")
os.system("echo from a compiler >&2")
print("from Python")
console.line("ours")
if len(sys.argv) == 1:
    console.restore(show=True)
    print("after")
else:
    console.log_to(sys.argv[1])
    os.write(2, b"from C again\\n")
    print("from Python again")
    console.error("an error of ours")
    os.abort()
"""


def speak(*arguments):
    command = [sys.executable, "-c", SPEAKER, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_output_of_libraries_goes_to_the_log_and_stacks_of_a_crash_to_the_console(tmp_path):
    (tmp_path / "log.txt").write_text("an earlier line\n")
    done = speak(tmp_path / "log.txt")
    assert done.returncode == -signal.SIGABRT
    assert done.stdout == "before\nours\n"
    first, *rest = done.stderr.splitlines()
    assert first == "an error of ours"
    assert rest[0] == "Fatal Python error: Aborted"  # its stacks
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        "an earlier line", "from C", "from a compiler", "from Python", "from C again", "from Python again",
    ]  # fmt: skip


def test_without_a_log_output_is_shown_with_the_error():
    done = speak()
    assert done.stdout == "before\nours\nafter\n"
    assert done.stderr == "from C\nfrom a compiler\nfrom Python\n"


def screen(data):
    """The lines that a terminal shows for this output, and all contents that its last line had."""
    lines, last, column, was = [], "", 0, set()
    for part in re.split(r"(\n|\r|\x1b\[K)", data):
        if part == "\n":
            lines.append(last)
            last, column = "", 0
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            last = last[:column]
        else:
            last = last[:column] + part + last[column + len(part) :]
            column += len(part)
            was.add(last)
    return [*lines, last], was


def in_a_terminal(*arguments):
    """(exit code, output) of `lcm-ds …` with one terminal of 100 columns as stdout and stderr."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    command = [sys.executable, "-m", "lcm_ds.cli", *map(str, arguments)]
    subprocess.run(["stty", "cols", "100"], stdin=theirs, check=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    data, deadline = b"", time.monotonic() + patience(240)
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                data += os.read(ours, 1 << 16)
            except OSError:  # all processes have closed it
                break
    os.close(ours)
    return process.wait(timeout=patience(30)), data.decode().replace("\r\n", "\n")


def test_a_terminal_has_a_bar_below_the_lines_that_is_removed_at_the_end(make_config):
    code, data = in_a_terminal("launch", "--local", 2, make_config(steps=25, log={"every": 5}))
    lines, was = screen(data)
    assert code == 0, data
    assert all(map(of_ours, filter(None, lines))), data
    assert len([line for line in lines if re.fullmatch(STEP, line)]) == 5
    bars = [line for line in was if "━" in line]
    assert any("25 of 25 steps (100%)" in line for line in bars)
    assert any("validating" in line for line in bars)
    assert max(map(len, bars)) < 100
    assert not [line for line in lines if "━" in line]


@pytest.mark.slow
def test_not_a_line_of_a_library_reaches_the_console_of_a_preparation(tmp_path):
    settings = ("source.take_sentences=700", f"output={tmp_path / 'dataset'}")
    code, out, err = finish(start("prepare", "configs/prepare/quickstart.yaml", *settings, HF_HUB_OFFLINE="1"))
    assert (code, err) == (0, "")
    ours = r"\S+: start-up: .*|encoding: .*|normaliser: .*"
    ours += r"|[\d,]+ documents of .*|encoded [\d,]+ sentences in .*|\S+: [\d,]+ documents: .*"
    assert [line for line in out.splitlines() if not re.fullmatch(ours, line)] == []


@pytest.mark.slow
def test_not_a_line_of_a_library_reaches_the_console_of_a_first_run(make_config, tmp_path):
    """With nothing compiled yet: ninja and g++ print as well, of the optimizer on the CPU, too."""
    config = make_config(steps=4, deepspeed="ds_configs/zero2_offload.json")
    cold = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "NCCL_DEBUG": "INFO", "TORCH_CPP_LOG_LEVEL": "INFO"}
    code, out, err = finish(start("launch", "--local", 2, config, **cold), timeout=280)
    assert code == 0, out + err
    assert [line for line in out.splitlines() if not of_ours(line)] == []
    assert err == ""
    assert any((tmp_path / "extensions").iterdir())
    assert "DeepSpeed" in (run_dir(config) / "log.txt").read_text()
    for verb in (["evaluate", run_dir(config)], ["export", run_dir(config), tmp_path / "model"]):
        code, out, err = finish(start(*verb))
        assert (code, err) == (0, "")
        assert "Warning" not in out
