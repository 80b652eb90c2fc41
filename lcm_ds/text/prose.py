"""Docstrings and plain-text manuals → the English sentences in them.

Documentation is written in reStructuredText and its dialects, full of code, tables and lists of parameters. What is not
prose goes, what is left is told apart by how an English sentence looks. Losing a sentence is harmless here, keeping
code is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

# Directives whose body is prose; the bodies of all others (code, math, versions, …) go.
_PROSE_DIRECTIVES = frozenset({"note", "warning", "attention", "caution", "important", "tip", "seealso", "admonition"})
# Headings of sections that are lists of parameters or code, in Google's way (with a colon) and numpy's (underlined).
_SECTION = re.compile(
    r"(keyword |optional |other )?(args?|arguments?|attributes?|examples?|inputs?|kwargs|options|outputs?|parameters?"
    r"|params?|raises|references?|returns?|see also|shape|usage|yields?):{0,2}"
)
_DIRECTIVE = re.compile(r"\.\.\s+([\w:-]+?)::\s*(.*)$")
_COMMENT = re.compile(r"\.\.(\s|$)")
_FIELD = re.compile(r":\w[\w ]*:(\s|$)|@\w+")
_UNDERLINE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}[=\- ]*$")
_TABLE = re.compile(r"[|+]")
_ITEM = re.compile(r"(?:[-*+•o]|\(?(?:\d{1,2}|[a-zA-Z])[.)])\s+(?=\S)")
_INLINE = [
    (re.compile(r":[\w:+-]+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :class:`~a.B`, :ref:`title <target>`
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"`([^`<]+?)(?:\s*<[^`>]*>)?`_{0,2}"), r"\1"),  # `x`, `title <address>`_
    (re.compile(r"(?<!\w)(\*\*?)(?=\S)([^*]+?)(?<=\S)\1(?!\w)"), r"\2"),  # *x*, **x**
    (re.compile(r"\s*\[(?:\d+|#\w*)\]_?"), ""),  # footnotes
    (re.compile(r"\\(?=\W)"), ""),
    (re.compile(r"(?<=\w)_(?=[\s.,;:)]|$)"), ""),  # reference_
]

_SHAPE = re.compile(r"[\"'“]?[A-Z][^=<>{}\\|~^$@#\[\]`]*[.!?][\"'”)]*")
_LETTERS = re.compile(r"[A-Za-z ]")
_WORD = re.compile(r"[\"'“(]*[A-Za-z][a-z]*(?:[-'’][A-Za-z]+)*[.,;:!?)\"'”]*")
# Hardly any English sentence of four words is without all of these.
_COMMON_WORDS = """
a an and any are as at be but by can do does for from has have if in is it its may must no not of on only or
should than that the their then there these they this to was we when which will with you
"""
_COMMON = frozenset(_COMMON_WORDS.split())


def prose(text: str) -> str:
    """The paragraphs of a docstring or manual that may hold sentences, a blank line apart, inline markup taken off."""
    paragraphs = "\n".join(_prose_lines(text.expandtabs().splitlines())).split("\n\n")
    return "\n\n".join(_without_markup(" ".join(paragraph.split())) for paragraph in paragraphs if paragraph.strip())


def is_prose(sentence: str) -> bool:
    """Whether this looks like a whole English sentence of at least four words, and not like code or a list entry."""
    words = sentence.split()
    if len(words) < 4 or not _SHAPE.fullmatch(sentence) or sentence.count("(") != sentence.count(")"):
        return False
    plain = sum(1 for word in words if _WORD.fullmatch(word))
    letters = len(_LETTERS.findall(sentence))
    common = any(word.strip("\"'“”(),.").lower() in _COMMON for word in words)
    return common and plain >= 0.7 * len(words) and letters >= 0.85 * len(sentence) and "__" not in sentence


def _prose_lines(lines: list[str]) -> Iterator[str]:
    """The lines that may be prose; an empty one stands for whatever ends a paragraph."""
    fenced = doctest = parameters = False
    block: int | None = None  # lines indented deeper than this belong to a block that is no prose
    for line, following in pairwise([*lines, ""]):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text.startswith("```"):
            fenced = not fenced
            yield ""
        elif fenced or not text:
            doctest = False
            yield ""
        elif _UNDERLINE.match(following.strip()):
            parameters, block = _SECTION.fullmatch(text.lower()) is not None, None
            yield ""
        elif doctest or parameters or (block is not None and indent > block):
            yield ""
        else:
            block = None
            directive, item = _DIRECTIVE.match(text), _ITEM.match(text)
            if text.startswith(">>>"):
                doctest = True
                yield ""
            elif directive and directive[1] in _PROSE_DIRECTIVES:
                yield from ("", directive[2])
            elif directive or _COMMENT.match(text) or _FIELD.match(text) or _is_section(text):
                block = indent
                yield ""
            elif _UNDERLINE.match(text) or _TABLE.match(text):
                yield ""
            else:
                if text.endswith("::"):  # a literal block follows
                    block = indent
                yield from ("", text[item.end() :]) if item else (text,)


def _is_section(line: str) -> bool:
    return line.endswith(":") and _SECTION.fullmatch(line.lower()) is not None


def _without_markup(paragraph: str) -> str:
    for pattern, replacement in _INLINE:
        paragraph = pattern.sub(replacement, paragraph)
    return paragraph
