"""Reads the commands of README.md and docs/, runs them as a reader would, and finds the program's messages in its code.

Blocks fenced as ```bash hold commands; those fenced as ```console hold commands, behind "$ ", and what they print. A
block whose first line is a comment "# needs …" is for other hardware or data than every machine has: its commands are
parsed, not run. In what is printed a line of "…" stands for any number of lines, and every number for any number.
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
    expected, lines = _lines(shown), _lines(printed.splitlines())
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
    """A line in which all numbers are one, and so are spaces and the rules of tables.

    What is retrieved, and where a generated text ends, depends on the documentation of the Python that is used.
    """
    line = re.sub(r"[─━┈┏┓┡┩┳╇│┃└┘┴├┤┼╭╮╰╯*]+", " ", line)
    line = re.sub(r"\d[\d,.:]*(e[+-]?\d+)?", "#", line)
    line = " ".join(re.sub(r"-#|[+−]#", "#", line).split())
    return re.sub(r"^(# retrieved #|stopped: ).*", r"\1", line)


def _lines(text: Iterable[str]) -> list[str]:
    """Lines that say something, those that are alike and follow one another as one."""
    return [line for line, _ in groupby(line for line in map(_alike, text) if line)]


# --- messages ---------------------------------------------------------------------------------------------------------

PACKAGE = REPOSITORY / "lcm_ds"
Function = ast.FunctionDef | ast.AsyncFunctionDef
# What reaches a user as text: exceptions, what is logged, and in calls of other names an argument by its number, with
# what they put behind it.
RAISED = {"InputError", "RunFailedError", "TransientError", "NoSpace", "Damaged", "PeerFailed"}
RAISED |= {"RuntimeError", "ImportError", "ConnectionError"}
LOGGED = {"error", "critical", "warning", "exception"}
PASSED_ON = {"Failure": (1, ""), "attempt": (2, ": …")}
# Names whose value is given out as it is, and functions that return or yield what goes there.
COLLECTED = {"errors", "wrong", "problems", "failures", "last", "mine"}
FINDS = re.compile(r"mistake|error|wrong|problem|damage|disagreement|combinations|missing|describe_exit|warning")
# Who says it, or of which file: in front of a colon.
WHOSE = re.compile(r"^(?:lcm-ds launch: |(?:…(?: …)*)?: )+")


def messages(package: Path = PACKAGE) -> dict[str, str]:
    """Every message that a user can see as an error or a warning, with the first place in the code that makes it.

    "…" stands where values do. Whose message it is (a file, a line, a key that the code fills in) is left out where it
    stands in front. The code is read, not run: what libraries say, and the schema's own words (pydantic's), are not
    here.
    """
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    everywhere: dict[str, list[ast.expr]] = {}
    for tree in trees.values():
        everywhere |= _assigned(tree)
    found: dict[str, str] = {}
    for path, tree in trees.items():
        reader = _Reader({**everywhere, **_assigned(tree)}, validates=path.name == "config.py")
        reader.visit(tree)
        for text, line in reader.found:
            found.setdefault(text, f"{path.relative_to(package.parent)}:{line}")
    return found


def explained(page: Path) -> list[str]:
    """The messages in a page's tables: the first of two columns, in backticks, where the second says something."""
    rows = re.findall(r"^\| `(.+?)` \| \S.* \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [row.replace("\\|", "|") for row in rows]


def row_of(message: str) -> str:
    """A message as the first column of a table has it."""
    return "| `" + message.replace("|", "\\|") + "` |"


def _assigned(scope: ast.Module | Function) -> dict[str, list[ast.expr]]:
    """What the names of a module, or of a function, are given."""
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


class _Reader(ast.NodeVisitor):
    """Finds the messages of one module."""

    def __init__(self, constants: dict[str, list[ast.expr]], validates: bool) -> None:
        self.constants, self.validates = constants, validates
        self.found: list[tuple[str, int]] = []
        self._functions: list[Function] = []  # around what is looked at

    def visit_FunctionDef(self, node: Function) -> None:
        self._functions.append(node)
        self.generic_visit(node)
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Call(self, node: ast.Call) -> None:
        number, behind = PASSED_ON.get(_name(node.func), (0, ""))
        if number:
            self._take(node.args[number : number + 1], node, behind)
        self._take(self._said_by(node), node)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return | ast.Yield) -> None:
        if self._finds and node.value is not None:
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
    def _finds(self) -> bool:
        return bool(self._functions) and FINDS.search(self._functions[-1].name) is not None

    def _collects(self, node: ast.expr) -> bool:
        return _name(node) in COLLECTED or (self._finds and _name(node) == "lines")

    def _said_by(self, call: ast.Call) -> list[ast.expr]:
        """The arguments of a call that a user gets to see."""
        name, keywords = _name(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
        again = isinstance(call.func, ast.Call) and ast.unparse(call.func) == "type(error)"
        if name in RAISED or again or (name == "ValueError" and self.validates):
            return call.args
        if name == "print":
            return call.args if ast.unparse(keywords.get("file", call.func)) == "sys.stderr" else []
        if not isinstance(call.func, ast.Attribute):
            return []
        of = call.func.value
        if (
            (name in LOGGED and (_name(of) == "logger" or "getLogger" in ast.unparse(of)))
            or (name in ("append", "extend") and self._collects(of))
            or (name == "say" and (len(call.args) == 1 or "error" in keywords))
        ):
            return call.args[:1]
        return []

    def _take(self, nodes: list[ast.expr], where: ast.expr | ast.stmt, behind: str = "") -> None:
        """Note the messages among what these expressions can be."""
        for text in (text + behind for text in self._any(nodes)):
            text = re.sub(r"%[\d.]*[sdf]", "…", text).replace("%%", "%")  # as loggers take it
            text = WHOSE.sub("", " ".join(re.sub("…+", "…", text).split()))
            if re.search(r"[a-z]{2}", text):
                self.found.append((text, where.lineno))

    def _any(self, nodes: Iterable[ast.expr]) -> list[str]:
        return [text for node in nodes for text in self._texts(node)]

    def _texts(self, node: ast.expr) -> list[str]:
        """The texts that an expression can be, as far as the code tells."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                text = re.sub("…+", "…", "".join(map(self._part, parts)))
                if re.search("[a-z]", WHOSE.sub("", text)):
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
                return self._any(self._given(name))
        return []

    def _part(self, part: ast.expr) -> str:
        """A piece of an f-string: its words, a word that the program always says there, or …"""
        match part:
            case ast.Constant(value=str(text)):
                return text
            case ast.FormattedValue(value=ast.Name(id=name)) if name.isupper():
                return next(iter(self._any(self.constants.get(name, []))), "…")
        return "…"

    def _given(self, name: str) -> list[ast.expr]:
        """What a name is given, in the functions around or in the module; nothing for a parameter and the like."""
        scopes = [*map(_assigned, reversed(self._functions)), self.constants]
        given = next((scope[name] for scope in scopes if name in scope), [])
        # What is made of the name itself tells nothing more.
        return [value for value in given if all(getattr(part, "id", "") != name for part in ast.walk(value))]
