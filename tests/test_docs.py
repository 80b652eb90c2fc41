"""What the documentation says a user can type, a user can type; what it shows is what is printed."""

import os
import re
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from docs import PAGES, REPOSITORY, blocks, differs, explained, messages, row_of
from machine import patience

from lcm_ds.cli import build_parser

ALL = [block for page in PAGES for block in blocks(page)]
# What other tests run, or would run these tests again.
ELSEWHERE = ("make test", "make check", "make format", "make install", "git clone", "pre-commit", "pip install", "cd ")
ORDER = ("README.md", "data.md", "evaluation.md", "generation.md", "finetuning.md")  # then all others


def named(block):
    return f"{block.page.name}:{block.line}"


def commands(block):
    """The calls of lcm-ds in a block, as lists of words; the variables in front of them are left out."""
    for command in block.commands:
        words = command.words
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and words[0] == "lcm-ds":
            yield list(takewhile(lambda word: not re.fullmatch(r"&&?|\||\d?[<>]+", word), words[1:]))


@pytest.mark.parametrize("block", ALL, ids=named)
def test_every_command_is_one_that_the_program_takes(block):
    parser = build_parser()
    for words in commands(block):
        parsed, rest = parser.parse_known_args(words)
        assert all("=" in word and not word.startswith("-") for word in rest), words
        for word in words:
            if re.fullmatch(r"(configs|ds_configs|launch)/\S+\.\w+", word):
                assert (REPOSITORY / word).is_file(), word
        assert parsed.verb is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_blocks_that_are_run_or_say_what_they_need(page):
    text = re.sub(r"^(\s*)(`{3,})\w*\n.*?\n\1\2$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    programs = "lcm-ds|make|python|pip|torchrun|deepspeed|srun|sbatch|scontrol|tensorboard"
    assert not re.findall(rf"^    (?:[A-Z_]+=\S+ |launch/|(?:{programs}) ).*", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", link):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_what_is_shown_and_not_printed_is_found():
    printed = "step  10/200  loss 0.98\nstep 20/200  loss 0.91\nvalidation 0.9\n\ndone: 200 steps\n"
    assert differs(["step 10/20  loss 1.2", "…", "done: 9 steps"], printed) is None
    assert differs(["step 10/20  loss 1.2", "validation 1", "done: 9 steps"], printed) is None
    assert differs(["step 10/20  loss 1.2", "done: 9 steps"], printed) is not None
    assert differs(["…", "finished"], printed) is not None
    assert differs(["…", "step 1/2  loss 1"], printed) is not None
    assert differs(["step 10/20  loss 1.2", "…"], printed) is None


def test_every_message_is_explained_once_and_nothing_else_is():
    made, rows = messages(), explained(REPOSITORY / "docs" / "troubleshooting.md")
    told = [f"to explain: {row_of(text)} of {place}" for text, place in made.items() if text not in rows]
    told += [f"nowhere in the code: {row_of(text)}" for text in rows if text not in made]
    told += [f"stands {rows.count(text)} times: {row_of(text)}" for text in dict.fromkeys(rows) if rows.count(text) > 1]
    assert not told, "docs/troubleshooting.md:\n" + "\n".join(told)


CODE = '''
"""No message."""
GONE = "was removed"
REFUSED = {"amp": f"{GONE}: use bf16", "nebula": "is gone"}

def check(path, key, lines):
    """Raises InputError("in words")."""
    mistakes = [f"{path}: {line!r}: is no number" for line in lines]
    mistakes.append(f"{path}: {key}: {REFUSED[key]}")
    if not lines:
        mistakes += ["has no lines" if key else f"{path}: {key}{lines} has a|b"]
        mistakes.extend(["of " + lines, lines + " of", *(f"{line}: ends" for line in lines)])
    logger.error("%s: %.1f %% are %s", path, 1.0, 2)
    logger.info("%s: read", path)
    said = f"it {GONE} {path}"
    print(f"lcm-ds launch: {said}", file=sys.stderr)
    print("done")
    raise ValueError("a mistake of the programmer's")
    raise RunFailedError(f"{path}: {error}") from error

def damage(path):
    return None if path else "COMPLETE is missing"
'''


def test_messages_are_found_however_they_reach_the_user(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(CODE, encoding="utf-8")
    made = messages(tmp_path / "package")
    assert set(made) == {
        "is no number",
        "was removed: use bf16",
        "is gone",
        "has no lines",
        "… has a|b",
        "of …",
        "… of",
        "ends",
        "… % are …",
        "it was removed …",
        "COMPLETE is missing",
    }
    assert made["is gone"] == "package/module.py:9"
    page = tmp_path / "page.md"
    page.write_text(f"{row_of('… has a|b')} why. |\n{row_of('not explained')} |\n", encoding="utf-8")
    assert explained(page) == ["… has a|b"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A checkout as a reader has it, without what they would have made."""
    folder = tmp_path_factory.mktemp("reader") / "lcm-ds"
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if not name.startswith(("tests/", ".")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def run(command, folder):
    """Run a command of the documentation; returns its exit code and all that it printed."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "110", "PYTHONPATH": str(REPOSITORY)}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    text = command.text
    if text.startswith("make "):  # what it would install is what these tests run with
        text = text.replace("make ", f"make --silent -o {sys.prefix}/.installed VENV={sys.prefix} ", 1)
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience(600),
    )
    return done.returncode, done.stdout


def order(page):
    return ORDER.index(page.name) if page.name in ORDER else len(ORDER)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", sorted(PAGES, key=order), ids=lambda page: page.name)
def test_a_reader_sees_what_the_page_shows(page, workspace):
    for block in blocks(page):
        if block.needs is not None:
            continue
        for command in block.commands:
            if command.text.startswith(ELSEWHERE):
                continue
            code, printed = run(command, workspace)
            where = f"{page.name}:{command.line}: {command.text}"
            assert code in (0, 75) if "STOP" in command.text else code == 0, f"{where}\n{printed}"
            if command.shown is not None:
                wrong = differs(command.shown, printed)
                assert wrong is None, f"{where}\n{wrong}\n\n{printed}"
