"""The source `sample`: English that every machine of ours has, the documentation installed with Python and PyTorch.

One document a topic of Python's manual or a module of the standard library or of torch. Documentation repeats itself,
so that a plain split would put the same sentences into training and validation. Here each sentence occurs once in all
documents: whichever of them are held out, none of their sentences is in the rest.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lcm_ds.config import SentencesConfig, SourceConfig
from lcm_ds.text.base import TextDocument, even_units, window
from lcm_ds.text.prose import is_prose, prose
from lcm_ds.text.splitter import Splitter

# A document with a larger share of sentences that earlier documents have is taken for a copy.
MAX_SEEN = 0.3
_NOT_DOCUMENTED = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "_vendor", "__pycache__"}


class SampleSource:
    """Documents of whole English sentences, a blank line between any two, each sentence in one document only.

    `sentences` says how they are split later, which decides what counts as a sentence. The order is by a hash of the
    id, which mixes the three origins, so that a part of the documents is a fair sample of all.
    """

    def __init__(self, config: SourceConfig, sentences: SentencesConfig, index: dict[str, Any] | None = None) -> None:
        self.config, self.sentences = config, sentences
        self._documents: list[TextDocument] | None = None
        if index is not None:
            self._documents = [TextDocument(*document) for document in index["documents"]]

    @property
    def total(self) -> int:
        """How many documents there are."""
        return len(self._all())

    @property
    def characters(self) -> int:
        """Characters of all documents."""
        return sum(len(document.text) for document in self._all())

    def units(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of `size` documents."""
        return even_units(self.total, size)

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[TextDocument]:
        """Documents number `start` up to, not including, `stop`."""
        return iter(self._all()[start:stop])

    def describe(self) -> dict[str, Any]:
        """What the text was taken from, for dataset.json."""
        return {
            "name": "sample",
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
            **self.config.model_dump(include={"skip", "take", "take_sentences"}, exclude_defaults=True),
        }

    @property
    def sizes(self) -> dict[str, int]:
        """None: the text comes with Python and torch, whose versions say which it is."""
        return {}

    def index(self) -> dict[str, Any]:
        """The documents, so that other processes need not make them once more."""
        return {"documents": [(document.id, document.source, document.text) for document in self._all()]}

    def _all(self) -> list[TextDocument]:
        """All documents; the later ones depend on the earlier ones, so they are made once and kept (a few MB)."""
        if self._documents is None:
            self._documents = list(islice(self._distinct(), *window(self.config, 0, None)))
        return self._documents

    def _distinct(self) -> Iterator[TextDocument]:
        seen: set[str] = set()
        given = 0
        splitter = Splitter(self.sentences)
        for id, source, read in sorted(_texts(), key=lambda text: hashlib.sha256(text[0].encode()).digest()):
            if self.config.take_sentences is not None and given >= self.config.take_sentences:
                return
            sentences: dict[str, str] = {}
            for whole in splitter.whole("\n\n".join(map(prose, read()))):
                if is_prose(whole):
                    for sentence in splitter.cut(whole):
                        sentences.setdefault(_key(sentence), sentence)
            fresh = {key: sentence for key, sentence in sentences.items() if key not in seen}
            if fresh and len(sentences) - len(fresh) <= MAX_SEEN * len(sentences):
                seen.update(fresh)
                given += len(fresh)
                yield TextDocument(id, source, "\n\n".join(fresh.values()))


def _key(sentence: str) -> str:
    """What two sentences have in common that differ in case, punctuation or digits alone."""
    return "".join(character for character in sentence.lower() if character.isalpha())


def _texts() -> Iterator[tuple[str, str, Callable[[], list[str]]]]:
    """(id, source, function that reads the texts) of every topic and module; nothing is imported but the topics."""
    for name, text in _topics().items():
        yield f"topic:{name}", "python-topics", partial(list, (text,))
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    for source, root, prefix in (
        ("python", Path(sysconfig.get_path("stdlib")), ()),
        ("torch", Path(torch.origin).parent, ("torch",)),
    ):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not _NOT_DOCUMENTED.intersection(parts):
                module = ".".join((*prefix, *parts)).removesuffix(".__init__")
                yield f"{source}:{module}", source, partial(_docstrings, path)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems package Python without its manual
        return {}
    return topics


def _docstrings(path: Path) -> list[str]:
    """The docstrings of a module, its classes and functions, in the order of the file."""
    # A syntax tree is thousands of objects without a cycle: the collector would take 40 % of the time, for nothing.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [inspect.cleandoc(text) for text in _walk(ast.parse(path.read_bytes()))]
    except (SyntaxError, ValueError):  # a file for another version of Python
        return []
    finally:
        if collecting:
            gc.enable()


def _walk(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _walk(child)
