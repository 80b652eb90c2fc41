"""Texts → sentences: spaCy finds their ends, and those too long for a concept are cut at their best inner boundary.

Nothing but whitespace and control characters is lost, no sentence is longer than `max_characters`, and no word is cut
unless it is longer than that. Splitting the sentences again, each as a paragraph of its own, gives the same sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from lcm_ds.config import SentencesConfig, validate
from lcm_ds.errors import InputError

# Marks of scripts that put no space after a sentence or a clause: there, and only there, a sentence may end inside a
# run of characters without whitespace.
_UNSPACED_MARKS = "。！？｡．︒﹒﹖﹗、，；：､"
# What a sentence can end in, closing quotes and brackets aside.
# Amharic, Armenian, Burmese, Santali, Khmer and Tibetan ones: spaCy's tokenizers leave them at the word.
_MARKS_AT_WORDS = "።፧፨։။᱾᱿។៕།༎"
_END_MARKS = frozenset(".!?…‥।॥؟۔" + "。！？｡．︒﹒﹖﹗" + _MARKS_AT_WORDS)

# Their end marks, and what closes a quote behind one: tokens of their own.
_UNSPACED_END = re.compile(f"[。！？｡{_MARKS_AT_WORDS}]|(?<=[。！？｡”’」』）])[”’」』）]")

# Control characters, halves of surrogate pairs, and spaces of no width (which str.split does not know).
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\u200b\u2060\ufeff]")
_BLANK_LINE = re.compile(r"\n\s*\n")
_LIST_ITEM = re.compile(r"(?:[-*•·–—]|\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{2,4})[.)])\s")
# Possible cuts of a long sentence: at a space, or behind a mark that needs none.
_BREAK = re.compile(rf" |(?<=[{_UNSPACED_MARKS}])(?=\S)")
_CLAUSE_END = re.compile(rf"[,;:!?…)\]—–{_UNSPACED_MARKS}][\"'”’»]?$| [-—–]$")
# Hard-wrapped text has lines at least this long, and at most that long; other line ends are ends of paragraphs.
_WRAPPED_AT = range(40, 121)
# The number of the rules below, in dataset.json: raise it whenever a text gets other sentences.
_RULES = 2
# What may open a sentence before its first letter; what closes one behind a space, as in French; and Dutch and
# Afrikaans words such as 's, after which capitals come.
_OPENING = re.compile(r"[\"'“‘„«‹(\[{_*¡¿]*")
_SPACED_CLOSING = re.compile(r"[»)\]”] ")
_CLITIC = re.compile(r"['’][a-z] ")
# English abbreviations: before a name, and before a number or a bracket.
_TITLE_WORDS = """
capt cmdr col comdr ft gen gov hon lieut lt maj messrs mlle mme mr mrs ms prof pres rep rev sen sergt sgt supt
"""
_TITLES = frozenset(_TITLE_WORDS.split())
_NUMBERED_WORDS = """
app approx apr art arts aug bk ca cf ch chap chaps dec eq eqs ex feb fig figs jan jul jun lib mar no nos nov oct op p
para paras pl pp pt pts ref refs sec sect secs sep sept tab ver vol vols
"""
_NUMBERED = frozenset(_NUMBERED_WORDS.split())
_BRACKETED = _NUMBERED | {"al", "e.g", "i.e", "viz", "vs"}
# Those that are words, too, are abbreviations only with a capital: "No. 5", but "The answer was no. 12 men left."
_ALSO_WORDS = frozenset(["app", "art", "arts", "ex", "mar", "no", "tab"])
# Those after which a sentence seldom ends, and never before a lower-case letter; Roman numbers, initials, "a.m".
_UNENDING = re.compile(
    rf"(?:{'|'.join(sorted(_TITLES | _BRACKETED | {'&c', 'co', 'etc', 'esq', 'inc', 'jr', 'ltd', 'sr', 'st'}))}"
    r"|[ivxlcdm]+|\w|\w+(?:\.\w+)+)"
)
# Behind a quotation that ends in ! or ?: who speaks. To the end of the text, too: a long sentence may be cut there.
_SPEAKER = re.compile(
    r"(?:I|(?!(?:He|She|They|We|You|It|The|A|An|Then|And|But)\b)[A-Z][\w'’-]*\.?(?: [A-Z][\w'’-]*){0,2})"
    r"(?: (?:added|answered|asked|began|called|cried|demanded|ejaculated|exclaimed|gasped|inquired|interrupted|murmured"
    r"|muttered|observed|remarked|repeated|replied|responded|returned|said|says|screamed|shouted|shrieked|whispered"
    r"|yelled)\b|$)"
)
# spaCy refuses texts of more than nlp.max_length (a million) characters; its time is linear, so the number is free.
_MAX_PARAGRAPH = 100_000


class Splitter:
    """Cuts texts into sentences.

    >>> Splitter(SentencesConfig()).split("It rains.  Take\\nan umbrella, please!")
    ['It rains.', 'Take an umbrella, please!']

    Raises InputError if spaCy, the language or the named pipeline is not installed.
    """

    def __init__(self, config: SentencesConfig) -> None:
        self.config = config
        self._nlp = _pipeline(config)
        self._by_rules, self._english = config.pipeline is None, config.language == "en"
        # A word longer than a sentence may be: a link, a table or binary data, seldom language.
        self._endless_word = re.compile(rf"[^\s{_UNSPACED_MARKS}]{{{config.max_characters + 1},}}")

    @classmethod
    def from_settings(cls, settings: dict[str, Any], language: str | None, origin: str) -> Splitter:
        """The splitter with these `settings()`; missing ones have their default.

        Args:
            settings: As in dataset.json.
            language: That of the texts, for settings without one.
            origin: The file that the settings are from, for messages.

        Returns:
            The splitter.
        """
        chosen: dict[str, Any] = {"language": settings.get("language") or language or "en"}
        pipeline = settings.get("pipeline", "sentencizer")
        if pipeline != "sentencizer":
            chosen["pipeline"] = pipeline.split(" ")[0]  # its version follows
        if "max_characters" in settings:
            chosen["max_characters"] = settings["max_characters"]
        return cls(validate(SentencesConfig, chosen, f"{origin}: splitter"))

    def split(self, text: str) -> list[str]:
        """The sentences of a text, in order, none empty, each at most `max_characters` long.

        Whitespace becomes single spaces; control characters count as whitespace. A blank line ends a sentence, and so
        does a line end unless the line was wrapped there. Longer sentences are cut near the middle (or thirds, …)
        behind a clause mark, else at a space, never in a word; only a word longer than `max_characters` is cut into
        pieces of that many characters, each a sentence.
        """
        text = self._endless_word.sub(self._isolate, _CONTROL.sub(" ", text))
        sentences = (sentence for paragraph in _paragraphs(text) for sentence in self._sentences(paragraph))
        return [piece for sentence in sentences for piece in _cut(sentence, self.config.max_characters)]

    def settings(self) -> dict[str, Any]:
        """What determines the sentences, for dataset.json."""
        import spacy

        meta = self._nlp.meta
        pipeline = f"{meta['lang']}_{meta['name']} {meta['version']}" if self.config.pipeline else "sentencizer"
        return {
            "library": f"spacy {spacy.__version__}",
            "language": self._nlp.lang,
            "pipeline": pipeline,
            **({} if self.config.pipeline else {"rules": _RULES}),
            "max_characters": self.config.max_characters,
        }

    def _isolate(self, match: re.Match[str]) -> str:
        word, size = match.group(), self.config.max_characters
        return "\n\n" + "\n\n".join(word[start : start + size] for start in range(0, len(word), size)) + "\n\n"

    def _sentences(self, paragraph: str) -> Iterator[str]:
        """Sentences of one whitespace-normalised paragraph."""
        doc = self._nlp(paragraph)
        start = 0
        for token in doc[1:]:
            if token.is_sent_start:
                mark, end = _boundary(paragraph, start, token.idx)
                # A trained pipeline is better than these rules.
                continues = self._by_rules and mark is not None and _continues(paragraph, mark, end, self._english)
                if end > start and not continues:
                    yield paragraph[start:end].rstrip()
                    start = end
        yield paragraph[start:]


def _cut(sentence: str, limit: int) -> list[str]:
    """A sentence in about equal pieces of at most `limit` characters, each ending with a clause or a word.

    A word of more than `limit` characters is cut at the limit.
    """
    pieces = []
    while len(sentence) > limit:
        aim = len(sentence) / -(-len(sentence) // limit)
        breaks = [match.start() for match in _BREAK.finditer(sentence, 1, limit + 1)]
        best = min(breaks, default=limit, key=lambda position: _cost(sentence, position, aim))
        pieces.append(sentence[:best])
        sentence = sentence[best:].lstrip()
    return [*pieces, sentence]


def _cost(sentence: str, position: int, aim: float) -> float:
    """The cost of a cut: its distance from the balanced position `aim`, in shares of a piece.

    A clause mark is worth half a piece of distance: it wins over any space, unless it leaves a scrap.
    """
    distance = abs(position - aim) / aim
    return distance if _CLAUSE_END.search(sentence, max(0, position - 3), position) else distance + 0.5


def _boundary(text: str, start: int, end: int) -> tuple[int | None, int]:
    """The end mark and the end of a sentence from `start`, if spaCy lets the next one begin at `end`.

    The mark is None if there is none; an end at `start` means that the sentence continues.

    spaCy counts all punctuation behind a full stop, also an opening quote or dash, to the sentence that ends, and
    splits "os.PathLike" in two. Here the end is the first whitespace behind the last end mark, and without whitespace
    only a mark of a script that uses none ends a sentence.
    """
    gap = end
    while gap > start and not text[gap - 1].isalnum():
        gap -= 1
    for position in range(end - 1, gap - 1, -1):
        if text[position] in _END_MARKS:
            space = text.find(" ", position, end)
            if space >= 0:
                closing = _SPACED_CLOSING.match(text, space + 1)
                return position, closing.end() if closing else space + 1
            if text[position] in _UNSPACED_MARKS:
                return position, end
    # A pipeline that parses finds ends without any mark, as between a heading and what follows it.
    return None, end if text[end - 1] == " " else start


def _continues(text: str, mark: int, end: int, english: bool) -> bool:
    """Whether the sentence continues behind `end` despite the end mark at `mark`, judged by what comes next.

    Only the words around the mark are considered, so that parts of a sentence are judged like the sentence.
    """
    if text[mark] not in ".!?…":
        return False
    first = _OPENING.match(text, end).end()  # type: ignore[union-attr]
    letter = text[first : first + 1]
    # Georgian letters count as lower case, and have no capitals that begin a sentence.
    lower = letter.islower() and letter.title() != letter and not _CLITIC.match(text, end)
    quoted = end - mark > 2  # a space, and what closes a quotation or a bracket
    if text[mark] != ".":
        return lower or (english and quoted and text[mark] != "…" and _SPEAKER.match(text, end) is not None)
    written = text[text.rfind(" ", 0, mark) + 1 : mark].lstrip("\"'“‘([{")
    word = written.lower()
    if lower:
        return quoted or not word or word.endswith(".") or (english and _UNENDING.fullmatch(word) is not None)
    if not english or written in _ALSO_WORDS:
        return False
    if letter.isdigit() and first == end:
        return word in _NUMBERED
    return word in (_BRACKETED if text[end] in "([" else _TITLES)


def _paragraphs(text: str) -> Iterator[str]:
    """Whitespace-normalised paragraphs of at most `_MAX_PARAGRAPH` characters; none is empty."""
    for block in _BLANK_LINE.split(text):
        lines = [" ".join(line.split()) for line in block.splitlines()]
        for paragraph in _unwrapped([line for line in lines if line]):
            yield from _limited(paragraph)


def _unwrapped(lines: list[str]) -> Iterator[str]:
    """The paragraphs of a block, hard-wrapped lines joined.

    A line was wrapped if the next line's first word would not have fitted into the width of the block's longest line,
    or if the next line begins in lower case; a list item begins a paragraph.
    """
    if not lines:
        return
    width = max(map(len, lines))
    paragraph = [lines[0]]
    for before, line in pairwise(lines):
        full = width in _WRAPPED_AT and len(before) + 1 + len(line.split(" ", 1)[0]) > width
        if (full or line[0].islower()) and not _LIST_ITEM.match(line):
            paragraph.append(line)
        else:
            yield " ".join(paragraph)
            paragraph = [line]
    yield " ".join(paragraph)


def _limited(paragraph: str) -> Iterator[str]:
    """A paragraph in parts that spaCy accepts, cut behind an end mark if there is one, else at any break."""
    while len(paragraph) > _MAX_PARAGRAPH:
        breaks = [match.start() for match in _BREAK.finditer(paragraph, _MAX_PARAGRAPH // 2, _MAX_PARAGRAPH)]
        at_mark = [position for position in breaks if paragraph[position - 1] in _END_MARKS]
        last = (at_mark or breaks)[-1]
        yield paragraph[:last]
        paragraph = paragraph[last:].lstrip()
    yield paragraph


def _pipeline(config: SentencesConfig) -> Any:
    """The spaCy pipeline of a config, reduced to what finding sentences needs."""
    try:
        import spacy
    except ImportError:
        raise InputError("sentences need spaCy: pip install 'lcm-ds[prepare]'") from None
    if config.pipeline is None:
        try:
            nlp = spacy.blank(config.language)
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"sentences.language: spaCy has no pipeline for {config.language!r}: {reason}") from None
        _add_sentencizer(nlp)
        return _with_unspaced_ends(nlp)
    try:
        nlp = spacy.load(config.pipeline, exclude=["ner", "tagger", "attribute_ruler", "lemmatizer", "morphologizer"])
    except OSError:
        raise InputError(
            f"sentences.pipeline: spaCy's pipeline {config.pipeline!r} is not installed: "
            f"python -m spacy download {config.pipeline}, or leave the key out for the rule-based splitter"
        ) from None
    if not {"parser", "senter", "sentencizer"} & set(nlp.pipe_names):
        _add_sentencizer(nlp)
    return _with_unspaced_ends(nlp)


def _add_sentencizer(nlp: Any) -> None:
    from spacy.pipeline import Sentencizer

    nlp.add_pipe("sentencizer", config={"punct_chars": [*Sentencizer.default_punct_chars, *_MARKS_AT_WORDS]})


def _with_unspaced_ends(nlp: Any) -> Any:
    """The pipeline, cutting tokens also behind the end marks of scripts without spaces, and of some others.

    The tokenizers of most languages take a complete Chinese or Japanese paragraph for one word.
    """
    finds = getattr(nlp.tokenizer, "infix_finditer", None)
    if finds is not None:  # those of Chinese and Japanese know words of their own
        nlp.tokenizer.infix_finditer = lambda word: sorted(
            [*finds(word), *_UNSPACED_END.finditer(word)], key=lambda match: match.start()
        )
    return nlp
