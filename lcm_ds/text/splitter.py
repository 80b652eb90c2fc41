"""Texts → sentences: spaCy or ICU finds their ends, and those too long for a concept are cut at an inner boundary.

Nothing but whitespace and control characters is lost, no sentence is longer than `max_characters`, and no word is cut
unless it is longer than that. Splitting the sentences again, each as a paragraph of its own, gives the same sentences.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, pairwise, takewhile
from typing import Any

from lcm_ds.config import SentencesConfig, validate
from lcm_ds.errors import InputError
from lcm_ds.languages import short_code

# What ends a sentence in any script, with a space behind or without: Chinese and Japanese, Ethiopic, Burmese, Khmer,
# Tibetan, Santali, the danda of India, Arabic and Urdu, Armenian, Hebrew, Sinhala.
_SCRIPT_MARKS = "。！？｡︒﹒﹖﹗።፧፨။៕។།༎᱾᱿।॥؟۔։׃෴"
# Behind these a clause may end without a space.
_CLAUSE_MARKS = "，、；：､၊፣፤፥፦"
_UNSPACED_MARKS = _SCRIPT_MARKS + "．" + _CLAUSE_MARKS
# Between words or syllables, in Ethiopic and Tibetan, instead of a space.
_WORD_MARKS = "፡་"
# What a sentence can end in, closing quotes and brackets aside.
_END_MARKS = frozenset(".!?…‥．" + _SCRIPT_MARKS)
# What closes a quotation, a title or a bracket; what opens one belongs to the sentence behind it.
_CLOSERS = re.compile(r"[”’」』）》〉】〕〗｣)»\]]*")
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# All scripts but Latin, Greek and Cyrillic: spaCy's tokenizers leave a full stop at their letters and vowel signs.
_OTHER = rf"\u0530-\u1cff\u2d00-\u2ddf\ua500-\uabff\uac00-\ud7af\ufb1d-\ufdff{_CJK}"
_ARMENIAN = r"\u0531-\u0587\ufb13-\ufb17"
_INDIC = r"\u0900-\u0dff\u1c50-\u1c7f"
# Ends that characters show, whatever finds the others: marks of a script; marks that need a space behind, i.e. those
# of Latin behind other scripts, the Greek question mark and ellipses; ! and ? between Chinese or Japanese letters; and
# what is typed for the full stop of Armenian and the danda of India.
_SCRIPT_END = re.compile(
    rf"(?P<script>[{_SCRIPT_MARKS}](?:[{_SCRIPT_MARKS}!?…]| ?[།༎])*|፡፡+)"
    rf"|(?P<spaced>(?<=[{_OTHER}][{_OTHER}])(?:[.!?]+|…)|(?<=[\u0370-\u03ff\u1f00-\u1fff])[;\u037e]|\.{{3,}}|(?<=\w)\.\.|…+)"
    rf"(?=[”’»)\]\"']* )"
    rf"|(?P<cjk>(?<=[{_CJK}])[!?]+)(?=[”’」』）》〉】]*[{_CJK}“‘「『（《〈【])"
    rf"|(?P<colon>(?<=[{_ARMENIAN}»”\")\d]):)(?=[”’»)\]\"']*(?: |[{_ARMENIAN}]))"
    rf"|(?P<bar>(?<=[{_INDIC}”’\"')])(?: ?\|\|?(?:[\d ]+\|\|?)?))(?![|\d])"
)
# What stands before a colon or a bar, behind the last end mark or bar.
_SINCE_END = re.compile(r"(?:[^|:.!?։।॥]|[:.](?=\d))*$")
_LETTER = re.compile(r"\w")
# Behind these words ("and", "namely", the topic's) the mark of Tibetan ends a clause, not a sentence.
_TIBETAN_CLAUSE = re.compile("[་ ](?:དང|སྟེ|ཏེ|ནི|ཀྱང)[༌་]?།$")
# Thai and Lao mark no ends: their phrases, at spaces, are gathered to sentences of at most this many characters.
_PHRASES = 120
_PHRASED = re.compile(r"[\u0e01-\u0e2e\u0e81-\u0eae]")
_NO_PHRASE = re.compile(r"[\d(\[“\"'ๆໆ%/–-]")  # a space beside these is inside a phrase
_LEADING_VOWELS = "เแโใไເແໂໃໄ"  # of Thai and Lao: written before the consonant they belong to

# For trained pipelines, tokens of their own: end marks, and what closes a quote behind one.
_UNSPACED_END = re.compile(rf"[{_SCRIPT_MARKS}]|(?<=[。！？｡”’」』）])[”’」』）]")

# Control characters, halves of surrogate pairs, and spaces of no width (which str.split does not know).
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\u200b\u2060\ufeff]")
_BLANK_LINE = re.compile(r"\n\s*\n")
_LIST_ITEM = re.compile(r"(?:[-*•·–—]|\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{2,4})[.)])\s")
# Possible cuts of a long sentence: at a space, or behind a mark that needs none.
_BREAK = re.compile(rf" |(?<=[{_UNSPACED_MARKS}{_WORD_MARKS}])(?=\S)")
_CLAUSE_END = re.compile(rf"[,;:!?…)\]—–{_UNSPACED_MARKS}][\"'”’»]?$| [-—–]$")
# Hard-wrapped text has lines at least this long, and at most that long; other line ends are ends of paragraphs.
_WRAPPED_AT = range(40, 121)
_KNOWN_WORDS, _KNOWN_WORD = 1 << 16, 40  # whose tokens are kept: how many, of at most so many characters
# The number of the rules below, in dataset.json: raise it whenever a text gets other sentences.
_RULES = 4
# What may open a sentence before its first letter; what closes one behind a space, as in French; and Dutch and
# Afrikaans words such as 's, after which capitals come.
_OPENING = re.compile(r"[\"'“‘„«‹(\[{_*¡¿]*")
_SPACED_CLOSING = re.compile(r"[»)\]”] ")
_CLITIC = re.compile(r"['’][a-z] ")
# English abbreviations: before a name, and before a number or a bracket.
_TITLE_WORDS = """
capt cmdr col comdr dr ft gen gov hon lieut lt maj messrs mlle mme mr mrs ms prof pres rep rev sen sergt sgt supt
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
# SudachiPy, spaCy's tokenizer of Japanese, takes 49,149 bytes at most, and a character has up to four.
_MAX_PARAGRAPH = 12_000


class Splitter:
    """Cuts texts into sentences.

    >>> Splitter(SentencesConfig()).split("It rains.  Take\\nan umbrella, please!")
    ['It rains.', 'Take an umbrella, please!']

    Raises InputError if spaCy or ICU, the language or the named pipeline is not installed.
    """

    def __init__(self, config: SentencesConfig) -> None:
        self.config = config
        self._engine: _Spacy | _Icu | None = None
        if config.splitter != "none":
            self._engine = _Icu(config) if config.splitter == "icu" else _Spacy(config)
        self._by_rules, self._english = config.pipeline is None, config.language == "en"
        # A word longer than a sentence may be: a link, a table or binary data, seldom language.
        self._endless_word = re.compile(rf"[^\s{_UNSPACED_MARKS}{_WORD_MARKS}]{{{config.max_characters + 1},}}")

    @classmethod
    def from_settings(cls, settings: dict[str, Any], language: str | None, origin: str) -> Splitter:
        """The splitter with these `settings()`; missing ones have their default.

        Args:
            settings: As in dataset.json.
            language: That of the texts, for settings without one.
            origin: The file that the settings are from, for messages.

        Returns:
            The splitter; the default one for sentences that came as lists.
        """
        named = settings.get("language")
        chosen: dict[str, Any] = {"language": language or "xx" if named == BY_DOCUMENT else named or language or "en"}
        pipeline = settings.get("pipeline", "sentencizer")
        if settings.get("splitter") == "icu":
            chosen["splitter"] = "icu"
        elif pipeline != "sentencizer":
            chosen["pipeline"] = pipeline.split(" ")[0]  # its version follows
        if "max_characters" in settings:
            chosen["max_characters"] = settings["max_characters"]
        return cls(validate(SentencesConfig, chosen, f"{origin}: splitter"))

    def split(self, text: str) -> list[str]:
        """The sentences of a text, in order, none empty, each at most `max_characters` long.

        Whitespace becomes single spaces; control characters count as whitespace. A blank line ends a sentence, and so
        does a line end unless the line was wrapped there. Longer sentences are cut near the middle (or thirds, …)
        behind a clause mark, else at a space, never in a word; only a word longer than `max_characters` is cut into
        pieces of that many characters, each a sentence. With the splitter `none` each line is a sentence.
        """
        text = self._endless_word.sub(self._isolate, _CONTROL.sub(" ", text))
        if self._engine is None:
            sentences: Iterable[str] = _normalized_lines(text)
        else:
            paragraphs = list(_paragraphs(text))
            begins = self._engine.begins(paragraphs)
            found = (sentence for each in zip(paragraphs, begins, strict=True) for sentence in self._sentences(*each))
            sentences = (phrases for sentence in found for phrases in _gathered(sentence, self.config.max_characters))
        return [piece for sentence in sentences for piece in cut(sentence, self.config.max_characters)]

    def settings(self) -> dict[str, Any]:
        """What determines the sentences, for dataset.json."""
        limit = {"max_characters": self.config.max_characters}
        if self._engine is None:
            return {"splitter": "none", "language": self.config.language, **limit}
        rules = {"rules": _RULES, "phrases": f"Thai and Lao: at spaces, gathered to at most {_PHRASES} characters"}
        return {**self._engine.settings(), **(rules if self._by_rules else {}), **limit}

    def _isolate(self, match: re.Match[str]) -> str:
        return "\n\n" + "\n\n".join(_chopped(match.group(), self.config.max_characters)) + "\n\n"

    def _sentences(self, paragraph: str, begins: Iterable[int]) -> Iterator[str]:
        """Sentences of one whitespace-normalised paragraph, in which some of them are said to begin at `begins`."""
        start = 0
        for end, mark in self._ends(paragraph, begins):
            if self._by_rules and mark is not None and end == mark + 1:
                end = _closed(paragraph, start, end)
            # Not without a word, as a quotation mark or dots alone.
            if end <= start or end >= len(paragraph) or _LETTER.search(paragraph, start, end) is None:
                continue
            # A trained pipeline is better than these rules.
            if self._by_rules and mark is not None and _continues(paragraph, mark, end, self._english):
                continue
            yield paragraph[start:end].rstrip()
            start = end
        yield paragraph[start:]

    def _ends(self, paragraph: str, begins: Iterable[int]) -> list[tuple[int, int | None]]:
        """Possible ends of sentences, each with its end mark, None if it has none; what closes may follow."""
        ends: dict[int, int | None] = {}
        for begin in begins:
            found = _boundary(paragraph, begin)
            # Those of scripts are found below, by their marks.
            if found is not None and not (
                self._by_rules and found[1] is not None and paragraph[found[1]] in _SCRIPT_MARKS
            ):
                ends[found[0]] = found[1]
        if self._by_rules and (".." in paragraph or not paragraph.isascii()):
            ends.update(_script_ends(paragraph))
        return sorted(ends.items(), key=lambda item: item[0])


BY_DOCUMENT = "by document"  # the language in the settings of a dataset of several
_NEED_PACKAGES = ("ja", "ko", "th", "vi")  # even spaCy's blank pipelines of these languages


def for_language(config: SentencesConfig, code: str) -> SentencesConfig:
    """The config for a document in a language, SONAR's code: with the rules that spaCy or ICU has for it.

    The same on every machine: pipelines of spaCy that need further packages are not used.
    """
    language = short_code(code)
    if config.splitter == "spacy":
        from spacy.util import get_lang_class

        try:
            get_lang_class(language or "xx")
        except ImportError:
            language = None
        language = None if language in _NEED_PACKAGES else language
    return config.model_copy(update={"language": language or ("xx" if config.splitter == "spacy" else "und")})


def clean(text: str) -> str:
    """A text on one line, with single spaces; control characters and halves of surrogate pairs are spaces, too."""
    return " ".join(_CONTROL.sub(" ", text).split())


class _Spacy:
    """spaCy's rules for a language, or a trained pipeline."""

    def __init__(self, config: SentencesConfig) -> None:
        self.config = config
        self._nlp = _pipeline(config)
        self._marks = self._special_cases = frozenset[str]()
        self._find_mark: Callable[[str, int], re.Match[str] | None] | None = None
        if config.pipeline is None and _has_words_of_their_own(self._nlp.tokenizer):
            self._marks = frozenset(self._nlp.get_pipe("sentencizer").punct_chars)
            self._find_mark = re.compile("[" + re.escape("".join(self._marks)) + "]").search
            self._special_cases = _special_cases(self._nlp.tokenizer)
        self._longest_case = max(map(len, self._special_cases), default=0)
        self._tokens: dict[str, tuple[tuple[int, bool], ...] | None] = {}

    def begins(self, paragraphs: list[str]) -> Iterator[list[int]]:
        """Where the sentences of each paragraph begin, but the first; their words are separated by single spaces."""
        if self._find_mark is not None:
            return map(self._begins_by_marks, paragraphs)
        return map(self._begins_by_spacy, paragraphs)

    def _begins_by_spacy(self, text: str) -> list[int]:
        return [token.idx for token in self._nlp(text)[1:] if token.is_sent_start]

    def _begins_by_marks(self, text: str) -> list[int]:
        """What spaCy's sentencizer says, from the words with an end mark and those that follow until a sentence begins.

        A sentence begins with the first token behind an end mark that is not punctuation. The tokenizer cuts every word
        in the same way wherever it stands, so that most words need not be cut at all.
        """
        found, end = [], 0
        assert self._find_mark is not None
        while (mark := self._find_mark(text, end)) is not None:
            begin, behind_mark = text.rfind(" ", 0, mark.start()) + 1, False
            while True:
                end = text.find(" ", begin) % (len(text) + 1)  # -1: the length
                tokens = self._tokens_of(text[begin:end])
                if tokens is None:
                    return self._begins_by_spacy(text)
                for offset, is_mark in tokens:
                    if is_mark:
                        behind_mark = True
                    elif behind_mark:
                        found.append(begin + offset)
                        behind_mark = False
                if not behind_mark or end == len(text):
                    break
                begin = end + 1
        return found

    def _tokens_of(self, word: str) -> tuple[tuple[int, bool], ...] | None:
        """Where each token of a word begins that is an end mark or no punctuation, and whether it is an end mark.

        None if they depend on other words: a special case inside a word is kept unless another one is found across a
        space, as ":o" in ": o.O.".
        """
        if (known := self._tokens.get(word)) is not None or word in self._tokens:
            return known
        tokens = list(self._nlp.tokenizer(word))
        found = None
        if word in self._nlp.tokenizer.rules or not self._has_special_case(word, tokens):
            kinds = ((each.idx, each.text in self._marks, each.is_punct) for each in tokens)
            found = tuple((begin, is_mark) for begin, is_mark, is_punct in kinds if is_mark or not is_punct)
        if len(self._tokens) >= _KNOWN_WORDS:
            self._tokens.clear()
        if len(word) <= _KNOWN_WORD:
            self._tokens[word] = found
        return found

    def _has_special_case(self, word: str, tokens: list[Any]) -> bool:
        """Whether successive tokens of a word are one."""
        for number, first in enumerate(tokens):
            for last in tokens[number:]:
                end = last.idx + len(last)
                if end - first.idx > self._longest_case:
                    break
                if word[first.idx : end] in self._special_cases:
                    return True
        return False

    def settings(self) -> dict[str, Any]:
        """For dataset.json."""
        import spacy

        meta = self._nlp.meta
        pipeline = f"{meta['lang']}_{meta['name']} {meta['version']}" if self.config.pipeline else "sentencizer"
        return {"library": f"spacy {spacy.__version__}", "language": self._nlp.lang, "pipeline": pipeline}


class _Icu:
    """ICU's rules (Unicode Standard Annex 29), without ends behind the abbreviations that it knows of a language."""

    def __init__(self, config: SentencesConfig) -> None:
        self.config = config
        try:
            from icu4py.breakers import SentenceBreaker
        except ImportError:
            raise InputError("sentences.splitter: icu needs: pip install 'lcm-ds[icu]'") from None
        self._breaker: Callable[[str, str], Iterable[str]] = SentenceBreaker
        self._locale = f"{config.language}@ss=standard"

    def begins(self, paragraphs: list[str]) -> Iterator[list[int]]:
        """Where the sentences of each paragraph begin, but the first."""
        # All at once, because reading a language's abbreviations takes longer than a paragraph; a sentence ends behind
        # each of them. Strings are measured, as the breaker's offsets (icu4py 1.2.0) count UTF-16.
        ends = accumulate(map(len, self._breaker("\u2029".join(paragraphs), self._locale)))
        starts = accumulate((len(paragraph) + 1 for paragraph in paragraphs), initial=0)
        for paragraph, start in zip(paragraphs, starts, strict=False):
            yield [end - start for end in takewhile((start + len(paragraph)).__gt__, ends)]

    def settings(self) -> dict[str, Any]:
        """For dataset.json."""
        from importlib.metadata import version

        return {"splitter": "icu", "library": f"icu4py {version('icu4py')}", "language": self.config.language}


def _script_ends(text: str) -> Iterator[tuple[int, int]]:
    """Possible ends of sentences that marks show in any script, each with the last mark."""
    for match in _SCRIPT_END.finditer(text):
        spaced = match.lastgroup == "spaced"
        before, behind = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        if not (before.isdigit() and behind.isdigit()) and _stands_for_stop(text, match):
            yield text.index(" ", match.end()) + 1 if spaced else match.end(), match.end() - 1


def _stands_for_stop(text: str, match: re.Match[str]) -> bool:
    """Whether a colon ends an Armenian sentence, a bar one of India's; true for all other marks.

    A colon behind a single word is that of a label, and one before a lower-case letter that of an enumeration. A bar
    with spaces on both sides, or on none, may also be between the items of a menu, which have one or two words.
    """
    kind = match.lastgroup
    if kind not in ("colon", "bar"):
        return True
    since: str = _SINCE_END.search(text, 0, match.start()).group()  # type: ignore[union-attr]
    words = len(since.split())
    if kind == "bar":
        alike = "||" not in match.group() and (match.group()[0] == " ") == (text[match.end() :][:1] == " ")
        return re.search(f"[{_INDIC}]", since) is not None and words >= (3 if alike else 1)
    closed = _CLOSERS.match(text, match.end()).end()  # type: ignore[union-attr]
    letter = text[_OPENING.match(text, closed + (text[closed : closed + 1] == " ")).end() :][:1]  # type: ignore[union-attr]
    return words > 1 and re.search(f"[{_ARMENIAN}]", since) is not None and (letter.isupper() or letter.isdigit())


def _closed(text: str, start: int, end: int) -> int:
    """The end of a sentence with what closes behind its mark and a space; 0 if it continues there.

    Args:
        text: The paragraph.
        start: Where the sentence begins.
        end: Behind its end mark.
    """
    if text[end : end + 1] == '"' and text.count('"', start, end) % 2:
        end += 1
    end = _CLOSERS.match(text, end).end()  # type: ignore[union-attr]
    behind = text[end : end + 1]
    # A clause mark, or the Japanese particle behind what is quoted.
    if behind and (behind in _CLAUSE_MARKS + ",;:" or (behind == "と" and text[end - 1] in "」』")):
        return 0
    if text[end - 1] == "།" and _TIBETAN_CLAUSE.search(text, max(start, end - 8), end):
        return 0
    return end + (behind == " ")


def _gathered(sentence: str, limit: int) -> list[str]:
    """A sentence of Thai or Lao in phrases, each at most `_PHRASES` characters if it has spaces; others as they are."""
    limit = min(limit, _PHRASES)
    if len(sentence) <= limit or 4 * len(_PHRASED.findall(sentence)) < len(sentence):  # half of Thai are consonants
        return [sentence]
    phrases: list[str] = []
    aim = len(sentence) / -(-len(sentence) // limit)
    for word in sentence.split(" "):
        inside = phrases and (_NO_PHRASE.match(word) or _NO_PHRASE.match(phrases[-1][-1]))
        if phrases and len(phrases[-1]) + 1 + len(word) <= limit and (inside or len(phrases[-1]) < 0.8 * aim):
            phrases[-1] += f" {word}"
        else:
            phrases.append(word)
    return phrases


def cut(sentence: str, limit: int) -> list[str]:
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

    A clause mark is worth half a piece of distance, and a space another half: a clause mark wins over any space, unless
    it leaves a scrap, and a space over the end of a syllable.
    """
    distance = abs(position - aim) / aim
    if _CLAUSE_END.search(sentence, max(0, position - 3), position):
        return distance
    return distance + (0.5 if sentence[position] == " " else 1.0)


def _chopped(word: str, size: int) -> Iterator[str]:
    """A word in pieces of `size` characters, fewer where a letter and its vowel sign would be torn apart."""
    while len(word) > size:
        at = size
        while at > size - 8 and (
            unicodedata.category(word[at])[0] == "M"
            or unicodedata.combining(word[at - 1]) == 9  # a virama, which joins two consonants
            or word[at - 1] in _LEADING_VOWELS
        ):
            at -= 1
        yield word[:at]
        word = word[at:]
    yield word


def _boundary(text: str, begin: int) -> tuple[int, int | None] | None:
    """The end of a sentence, and its end mark, if the next one is said to begin at `begin`; None if it continues.

    spaCy counts all punctuation behind a full stop, also an opening quote or dash, to the sentence that ends, and
    splits "os.PathLike" in two. Here the end is the first whitespace behind the last end mark, and without whitespace
    only a mark of a script that uses none ends a sentence, together with what closes behind it.
    """
    gap = begin
    while gap > 0 and not text[gap - 1].isalnum():
        gap -= 1
    for position in range(begin - 1, gap - 1, -1):
        if text[position] in _END_MARKS:
            space = text.find(" ", position, begin)
            if space >= 0:
                closing = _SPACED_CLOSING.match(text, space + 1)
                return (closing.end() if closing else space + 1), position
            if text[position] in _UNSPACED_MARKS:
                return _CLOSERS.match(text, position + 1).end(), position  # type: ignore[union-attr]
    # A pipeline that parses finds ends without any mark, as between a heading and what follows it.
    return (begin, None) if text[begin - 1] == " " else None


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
        for paragraph in _unwrapped(_normalized_lines(block)):
            yield from _limited(paragraph)


def _normalized_lines(text: str) -> list[str]:
    """The lines that are not blank, with single spaces."""
    return [line for each in text.splitlines() if (line := " ".join(each.split()))]


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
        nlp.add_pipe("sentencizer")
        return nlp
    try:
        nlp = spacy.load(config.pipeline, exclude=["ner", "tagger", "attribute_ruler", "lemmatizer", "morphologizer"])
    except OSError:
        raise InputError(
            f"sentences.pipeline: spaCy's pipeline {config.pipeline!r} is not installed: "
            f"python -m spacy download {config.pipeline}, or leave the key out for the rule-based splitter"
        ) from None
    if not {"parser", "senter", "sentencizer"} & set(nlp.pipe_names):
        nlp.add_pipe("sentencizer")
    return _with_unspaced_ends(nlp)


def _has_words_of_their_own(tokenizer: Any) -> bool:
    """Whether a tokenizer of spaCy cuts each word that has spaces around it by itself."""
    from spacy.tokenizer import Tokenizer

    return type(tokenizer) is Tokenizer and not any(" " in rule.strip() for rule in tokenizer.rules)


def _special_cases(tokenizer: Any) -> frozenset[str]:
    """What a tokenizer of spaCy would cut otherwise, also inside words."""
    affixes = ("prefix_search", "suffix_search", "infix_finditer", "token_match", "url_match")
    without = type(tokenizer)(tokenizer.vocab, rules={}, **{name: getattr(tokenizer, name) for name in affixes})
    return frozenset(case for case, tokens in tokenizer.rules.items() if len(tokens) > 1 or len(without(case)) > 1)


def _with_unspaced_ends(nlp: Any) -> Any:
    """The pipeline, cutting tokens also behind the end marks of scripts without spaces.

    The tokenizers of most languages take a complete Chinese or Japanese paragraph for one word.
    """
    finds = getattr(nlp.tokenizer, "infix_finditer", None)
    if finds is not None:  # those of Chinese and Japanese know words of their own
        nlp.tokenizer.infix_finditer = lambda word: sorted(
            [*finds(word), *_UNSPACED_END.finditer(word)], key=lambda match: match.start()
        )
    return nlp
