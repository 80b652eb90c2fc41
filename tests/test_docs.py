"""Commands in the documentation work and print what the pages show; error messages are explained."""

import os
import re
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from docs import PAGES, REPOSITORY, blocks, differs, explained, read_messages, row_of
from machine import patience

from lcm_ds.cli import build_parser

ALL = [block for page in PAGES for block in blocks(page)]
# Run by other tests, or would run these tests again.
NOT_RUN = tuple(f"make {target}" for target in ("test", "check", "docs", "format", "install"))
NOT_RUN += ("git clone", "pre-commit", "pip install", "cd ")
ORDER = ("README.md", "data.md", "evaluation.md", "generation.md", "finetuning.md")  # then the other pages


def block_id(block):
    return f"{block.page.name}:{block.line}"


def commands(block):
    """The calls of lcm-ds in a block, as lists of words, without variables in front."""
    for command in block.commands:
        words = command.words
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and words[0] == "lcm-ds":
            yield list(takewhile(lambda word: not re.fullmatch(r"&&?|\||\d?[<>]+", word), words[1:]))


@pytest.mark.parametrize("block", ALL, ids=block_id)
def test_every_command_is_valid(block):
    parser = build_parser()
    for words in commands(block):
        parsed, rest = parser.parse_known_args(words)
        assert all("=" in word and not word.startswith("-") for word in rest), words
        for word in words:
            if re.fullmatch(r"(configs|ds_configs|launch)/\S+\.\w+", word):
                assert (REPOSITORY / word).is_file(), word
        assert parsed.command is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_in_blocks_that_are_run_or_name_their_needs(page):
    text = re.sub(r"^(\s*)(`{3,})\w*\n.*?\n\1\2$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    programs = "lcm-ds|make|python|pip|torchrun|deepspeed|srun|sbatch|scontrol|tensorboard"
    assert not re.findall(rf"^    (?:[A-Z_]+=\S+ |launch/|(?:{programs}) ).*", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", link):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_lists_every_folder_of_the_package():
    table = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## The folders")[2].partition("\n## ")[0]
    folders = {path.parent.name for path in (REPOSITORY / "lcm_ds").glob("*/__init__.py")}
    assert set(re.findall(r"\]\(lcm_ds/(\w+)\)", table)) == folders


def test_differences_between_shown_and_printed_output_are_found():
    printed = "step  10/200  loss 0.98\nstep 20/200  loss 0.91\nvalidation 0.9\n\ndone: 200 steps\n"
    assert differs(["step 10/20  loss 1.2", "…", "done: 9 steps"], printed) is None
    assert differs(["step 10/20  loss 1.2", "validation 1", "done: 9 steps"], printed) is None
    assert differs(["step 10/20  loss 1.2", "done: 9 steps"], printed) is not None
    assert differs(["…", "finished"], printed) is not None
    assert differs(["…", "step 1/2  loss 1"], printed) is not None
    assert differs(["step 10/20  loss 1.2", "…"], printed) is None


def test_troubleshooting_holds_messages_of_the_code_and_every_error_that_does_not_say_what_to_do():
    messages, rows = read_messages(), explained(REPOSITORY / "docs" / "troubleshooting.md")
    errors = [f"needs a row: {row_of(text)} ({at})" for text, at in messages.to_explain.items() if text not in rows]
    errors += [
        f"is not in the code: {row_of(text)}" for text in rows if not {text, text.removesuffix(": …")} & messages.texts
    ]
    errors += [f"has {rows.count(text)} rows: {row_of(text)}" for text in dict.fromkeys(rows) if rows.count(text) > 1]
    assert not errors, "docs/troubleshooting.md:\n" + "\n".join(errors)


CODE = '''
"""No message."""
GONE = "was removed"
REFUSED = {"amp": f"{GONE}: use bf16", "nebula": "is gone"}

def check(path, key, lines):
    """Raises InputError("in words")."""
    errors = [f"{path}: {line!r}: is no number" for line in lines]
    errors.append(f"{path}: {key}: {REFUSED[key]}")
    if not lines:
        errors += ["has no lines" if key else f"{path}: {key}{lines} has a|b"]
        errors.extend(["of " + lines, lines + " of", *(f"{line}: ends" for line in lines)])
    logger.warning("%s: %.1f %% are %s", path, 1.0, 2)
    print(f"it {GONE} {path}", file=sys.stderr)
    raise ValueError("a bug")
    raise RunFailedError(f"{path}: {error}") from error

def damage(path):
    return None if path else "COMPLETE is missing"
'''


def test_messages_are_found_however_they_reach_the_user(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(CODE, encoding="utf-8")
    messages = read_messages(tmp_path / "package")
    to_explain = {"is no number", "is gone", "has no lines", "… has a|b", "of …", "… of", "ends", "COMPLETE is missing"}
    assert set(messages.to_explain) == to_explain
    assert set(messages.errors) == {*to_explain, "was removed: use bf16"}
    assert {"… % are …", "it was removed …"} <= messages.texts
    assert messages.errors["is gone"] == "package/module.py:9"
    page = tmp_path / "page.md"
    page.write_text(f"{row_of('… has a|b')} why. |\n{row_of('not explained')} |\n", encoding="utf-8")
    assert explained(page) == ["… has a|b"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A fresh checkout, without tests."""
    folder = tmp_path_factory.mktemp("reader") / "lcm-ds"
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if not name.startswith(("tests/", ".")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def run(command, folder):
    """Run a command of the documentation; returns its exit code and its output."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "110", "PYTHONPATH": str(REPOSITORY)}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    text = command.text
    if text.startswith("make "):  # use the environment of this test instead of installing one
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
            if command.text.startswith(NOT_RUN):
                continue
            code, printed = run(command, workspace)
            context = f"{page.name}:{command.line}: {command.text}"
            assert code in (0, 75) if "STOP" in command.text else code == 0, f"{context}\n{printed}"
            if command.shown is not None:
                difference = differs(command.shown, printed)
                assert difference is None, f"{context}\n{difference}\n\n{printed}"
