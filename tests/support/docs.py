"""Reads the commands of README.md and docs/ with their output, and the messages in the program's code.

A ```bash block holds commands; a ```console block holds commands, after "$ ", and their output. If the first line of a
block is a comment "# needs …", its commands need hardware or data that not every machine has: they are parsed, not run.
In output a line "…" matches any number of lines, and a number any number.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@dataclass
class Command:
    """A command of a page, and the output that the page shows, if any."""

    text: str
    line: int
    shown: list[str] | None = None

    @property
    def words(self) -> list[str]:
        """The command as the shell splits it, without comments."""
        return shlex.split(self.text, comments=True)


@dataclass
class Block:
    """A fenced block of commands."""

    page: Path
    line: int
    needs: str | None  # hardware or data that not every machine has
    commands: list[Command] = field(default_factory=list)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that hold commands."""
    result: list[Block] = []
    fence = kind = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        opened = re.match(r"\s*(`{3,})(\w*)", line)
        if opened and not fence:
            fence, kind = opened[1], opened[2]
            if kind in ("bash", "console"):
                result.append(Block(page, number, None))
        elif opened and opened[1] == fence and not opened[2]:
            fence = kind = ""
        elif kind in ("bash", "console"):
            _add(result[-1], kind, line.strip() if kind == "bash" else line, number)
    return result


def _add(block: Block, kind: str, line: str, number: int) -> None:
    """Add a line to a block."""
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
    """The first difference between the output shown and printed, or None; blank lines and table widths are ignored."""
    expected, lines = _lines(shown), _lines(printed.splitlines())
    position, any_lines = 0, False
    for line in expected:
        if line == "…":
            any_lines = True
            continue
        try:
            position = lines.index(line, position, len(lines) if any_lines else position + 1) + 1
        except ValueError:
            near = lines[position] if position < len(lines) else "the end"
            return f"{line!r} is shown, {near!r} was printed"
        any_lines = False
    if not any_lines and position < len(lines):
        return f"{lines[position]!r} was printed and is not shown"
    return None


def _normalise(line: str) -> str:
    """A line with numbers, spaces and table rules normalised.

    Retrieved sentences, and the end of a generated text, may differ between machines.
    """
    line = re.sub(r"[─━┈┏┓┡┩┳╇│┃└┘┴├┤┼╭╮╰╯*]+", " ", line)
    line = re.sub(r"\d[\d,.:]*(e[+-]?\d+)?", "#", line)
    line = " ".join(re.sub(r"-#|[+−]#", "#", line).split())
    return re.sub(r"^(# retrieved #|stopped: ).*", r"\1", line)


def _lines(text: Iterable[str]) -> list[str]:
    """The normalised lines that are not blank, without repetitions and the progress that slow machines print."""
    lines = (line for line in map(_normalise, text) if line and not line.startswith("# documents of # "))
    return [line for line, _ in groupby(lines)]


# --- messages ---------------------------------------------------------------------------------------------------------

PACKAGE = REPOSITORY / "lcm_ds"
Function = ast.FunctionDef | ast.AsyncFunctionDef
RAISED = {"InputError", "UnreachableModel", "RunFailedError", "TransientError", "NoSpace", "Damaged", "PeerFailed"}
RAISED |= {"RuntimeError", "ImportError", "ConnectionError"}
# Variables that collect errors, and functions that return or yield them.
COLLECTED = {"errors", "wrong", "problems", "failures", "last", "mine"}
RETURNS_ERRORS = re.compile(r"mistake|error|wrong|problem|damage|disagreement|combinations|missing|describe_exit")
# The file, host or rank that a message is about: in front of a colon.
PREFIX = re.compile(r"^(?:lcm-ds launch: |(?:…(?: …)*)?: )+")
# Messages with one of these words name the remedy, or the value that would be right; others need a row.
REMEDY = re.compile(
    r"\b(has to|have to|needs?|give|use|write|choose|take|restore|leave (it|the key) out|name (it|a|another)|submit"
    r"|pip install|works without|run's YAML|will do|would (do|be)|such as|instead|did you mean|only one|goes with"
    r"|is (below|above) \d|has steps|it has|rename all but one|keep one|remove the file|as in|set bf16"
    r"|leave (one|\w+ or \w+) out)\b|, not …|--help"
)


@dataclass
class Messages:
    """The messages in the code of a package, with "…" for values and without the file or host in front."""

    texts: set[str] = field(default_factory=set)  # every string
    errors: dict[str, str] = field(default_factory=dict)  # errors that end a program → first place in the code

    @property
    def to_explain(self) -> dict[str, str]:
        """The errors that do not say what to do."""
        return {text: place for text, place in self.errors.items() if not REMEDY.search(text)}


def read_messages(package: Path = PACKAGE) -> Messages:
    """Find the messages of a package in its code; those of libraries, such as pydantic, are not included."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    constants: dict[str, list[ast.expr]] = {}
    for tree in trees.values():
        constants |= _assigned(tree)
    messages = Messages()
    for path, tree in trees.items():
        reader = _Reader({**constants, **_assigned(tree)}, validates=path.name == "config.py")
        reader.visit(tree)
        messages.texts |= reader.texts
        for text, line in reader.errors:
            messages.errors.setdefault(text, f"{path.relative_to(package.parent)}:{line}")
    return messages


def explained(page: Path) -> list[str]:
    """The messages in a page's tables: the first of two columns, in backticks."""
    rows = re.findall(r"^\| `(.+?)` \| \S.* \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [row.replace("\\|", "|") for row in rows]


def row_of(message: str) -> str:
    """The first column of a table row for a message."""
    return "| `" + message.replace("|", "\\|") + "` |"


def _assigned(scope: ast.Module | Function) -> dict[str, list[ast.expr]]:
    """The values assigned to each name of a module or function."""
    names: dict[str, list[ast.expr]] = {}
    for node in scope.body if isinstance(scope, ast.Module) else ast.walk(scope):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                names.setdefault(name, []).append(value)
    return names


def _name(node: ast.expr) -> str:
    """The last name of an expression: of `report["problems"]` or `host.problems`, problems."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _as_message(text: str) -> str:
    text = re.sub(r"%[\d.]*[sdf]", "…", text).replace("%%", "%")  # placeholders of loggers
    return PREFIX.sub("", " ".join(re.sub("…+", "…", text).split()))


class _Reader(ast.NodeVisitor):
    """Finds the messages of one module."""

    def __init__(self, constants: dict[str, list[ast.expr]], validates: bool) -> None:
        self.constants, self.validates = constants, validates
        self.texts: set[str] = set()
        self.errors: list[tuple[str, int]] = []
        self._functions: list[Function] = []  # the functions around the current node

    def visit_FunctionDef(self, node: Function) -> None:
        self._functions.append(node)
        self.generic_visit(node)
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Constant(self, node: ast.Constant) -> None:
        self.texts.update(map(_as_message, self._texts(node)))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self.texts.update(map(_as_message, self._texts(node)))
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self.visit(part.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.texts.update(map(_as_message, self._texts(node)))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self._take(self._raised_by(node), node)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return | ast.Yield) -> None:
        if self._returns_errors and node.value is not None:
            self._take([node.value], node)
        self.generic_visit(node)

    visit_Yield = visit_Return

    def visit_Assign(self, node: ast.Assign) -> None:
        self._take([node.value] if self._collects(node.targets[0]) else [], node)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._take([node.value] if self._collects(node.target) else [], node)
        self.generic_visit(node)

    @property
    def _returns_errors(self) -> bool:
        return bool(self._functions) and RETURNS_ERRORS.search(self._functions[-1].name) is not None

    def _collects(self, node: ast.expr) -> bool:
        return _name(node) in COLLECTED or (self._returns_errors and _name(node) == "lines")

    def _raised_by(self, call: ast.Call) -> list[ast.expr]:
        """The arguments of a call that are, or become, the text of an error."""
        name = _name(call.func)
        again = isinstance(call.func, ast.Call) and ast.unparse(call.func) == "type(error)"
        if name in RAISED or again or (name == "ValueError" and self.validates):
            return call.args
        if name in ("append", "extend") and isinstance(call.func, ast.Attribute) and self._collects(call.func.value):
            return call.args[:1]
        return []

    def _take(self, nodes: list[ast.expr], at: ast.expr | ast.stmt) -> None:
        """Note the errors among the values of these expressions."""
        for text in map(_as_message, self._any(nodes)):
            self.texts.add(text)
            if re.search(r"[a-z]{2}", text):
                self.errors.append((text, at.lineno))

    def _any(self, nodes: Iterable[ast.expr]) -> list[str]:
        return [text for node in nodes for text in self._texts(node)]

    def _texts(self, node: ast.expr) -> list[str]:
        """The possible texts of an expression, as far as the code shows them."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                text = re.sub("…+", "…", "".join(map(self._part, parts)))
                if re.search("[a-z]", PREFIX.sub("", text)):
                    return [text]
                return self._any(part.value for part in parts if isinstance(part, ast.FormattedValue))
            case (
                ast.BinOp(left=ast.Constant() | ast.JoinedStr() as one, op=ast.Add(), right=other)
                | ast.BinOp(left=one, op=ast.Add(), right=ast.Constant() | ast.JoinedStr() as other)
            ):
                return [text + rest for text in self._texts(one) or ["…"] for rest in self._texts(other) or ["…"]]
            case ast.BinOp(left=one, op=ast.Add(), right=other) | ast.IfExp(body=one, orelse=other):
                return self._any([one, other])
            case (
                ast.List(elts=several) | ast.Tuple(elts=several) | ast.Dict(values=several) | ast.BoolOp(values=several)
            ):
                return self._any(several)
            case ast.GeneratorExp(elt=one) | ast.ListComp(elt=one) | ast.Starred(value=one):
                return self._texts(one)
            case ast.Call(func=ast.Attribute(value=ast.Name() as one, attr="get"), args=[_, other]):
                return self._any([one, other])
            case ast.Subscript(value=ast.Name() as one):
                return self._texts(one)
            case ast.Name(id=name):
                return self._any(self._values_of(name))
        return []

    def _part(self, part: ast.expr) -> str:
        """A part of an f-string: its text, the value of a constant, or …"""
        match part:
            case ast.Constant(value=str(text)):
                return text
            case ast.FormattedValue(value=ast.Name(id=name)) if name.isupper():
                return next(iter(self._any(self.constants.get(name, []))), "…")
        return "…"

    def _values_of(self, name: str) -> list[ast.expr]:
        """The values assigned to a name in the functions around it or the module; none for a parameter."""
        scopes = [*map(_assigned, reversed(self._functions)), self.constants]
        values = next((scope[name] for scope in scopes if name in scope), [])
        return [value for value in values if all(getattr(part, "id", "") != name for part in ast.walk(value))]
