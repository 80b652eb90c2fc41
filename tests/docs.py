"""Reads the commands of README.md and docs/, and runs them as a reader would.

Blocks fenced as ```bash hold commands; those fenced as ```console hold commands, behind "$ ", and what they print. A
block whose first line is a comment "# needs …" is for other hardware or data than every machine has: its commands are
parsed, not run. In what is printed a line of "…" stands for any number of lines, and every number for any number.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@dataclass
class Command:
    """A command of a page, and what is shown of its output; None where nothing is."""

    text: str
    line: int
    shown: list[str] | None = None

    @property
    def words(self) -> list[str]:
        """As the shell splits it, without comments."""
        return shlex.split(self.text, comments=True)


@dataclass
class Block:
    """A fenced block of commands."""

    page: Path
    line: int
    needs: str | None  # what every machine has not got
    commands: list[Command] = field(default_factory=list)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that hold commands."""
    found: list[Block] = []
    fence = kind = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        opened = re.match(r"\s*(`{3,})(\w*)", line)
        if opened and not fence:
            fence, kind = opened[1], opened[2]
            if kind in ("bash", "console"):
                found.append(Block(page, number, None))
        elif opened and opened[1] == fence and not opened[2]:
            fence = kind = ""
        elif kind in ("bash", "console"):
            _add(found[-1], kind, line.strip() if kind == "bash" else line, number)
    return found


def _add(block: Block, kind: str, line: str, number: int) -> None:
    """One more line of a block."""
    unfinished = block.commands and block.commands[-1].text.endswith("\\")
    if unfinished and block.commands[-1].shown in (None, []):
        block.commands[-1].text = block.commands[-1].text[:-1] + line.removeprefix("> ").strip()
    elif line.startswith("# needs "):
        block.needs = line.removeprefix("# needs ")
    elif kind == "console":
        if line.startswith("$ "):
            block.commands.append(Command(line.removeprefix("$ "), number, []))
        elif block.commands:
            shown = block.commands[-1].shown
            assert shown is not None
            shown.append(line)
    elif line and not line.startswith("#"):
        block.commands.append(Command(line, number))


def differs(shown: list[str], printed: str) -> str | None:
    """What a reader would not find in the output, or None. Blank lines and the width of tables are not compared."""
    expected = [_alike(line) for line in shown if line.strip()]
    lines = [line for line in map(_alike, printed.splitlines()) if line]
    at, free = 0, False
    for line in expected:
        if line == "…":
            free = True
            continue
        try:
            at = lines.index(line, at, len(lines) if free else at + 1) + 1
        except ValueError:
            near = lines[at] if at < len(lines) else "the end"
            return f"{line!r} is shown, {near!r} was printed"
        free = False
    if not free and at < len(lines):
        return f"{lines[at]!r} was printed and is not shown"
    return None


def _alike(line: str) -> str:
    """A line in which all numbers are one, and so are spaces, rules of tables and progress of nothing else."""
    line = re.sub(r"[─━┈┏┓┡┩┳╇│┃└┘┴├┤┼╭╮╰╯*]+", " ", line)
    line = re.sub(r"\d[\d,.:]*(e[+-]?\d+)?", "#", line)
    return " ".join(re.sub(r"-#|[+−]#", "#", line).split())
