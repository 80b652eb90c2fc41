"""Sentence splitting on one core: spaCy, ICU and none, whole and ICU's own rules alone.

python benchmarks/sentences.py [--documents 390] [--repeats 5]

Of the sample's chapters, in CPU seconds of this process; each time by a new splitter, which has no words yet.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

from lcm_ds.config import SentencesConfig, SourceConfig
from lcm_ds.text.open import open_source
from lcm_ds.text.splitter import Splitter


def new_splitter(config: SentencesConfig) -> Callable[[str], Sequence[str]]:
    """The function of a splitter that has cut nothing yet.

    Args:
        config: Its rules.
    """
    return Splitter(config).split


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=390)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    source = open_source(SourceConfig(name="sample", take=arguments.documents))
    texts = [document.text for document in source.documents() if isinstance(document.text, str)]
    ways: dict[str, Callable[[], Callable[[str], Sequence[str]]]] = {}
    for name in ("spacy", "icu", "none"):
        config = SentencesConfig.model_validate({"splitter": name})
        ways[f"splitter: {name}"] = partial(new_splitter, config)
    from icu4py.breakers import SentenceBreaker

    ways["ICU's rules alone"] = lambda: lambda text: list(SentenceBreaker(text, "en@ss=standard"))
    characters = sum(map(len, texts))
    print(f"{len(texts)} documents, {characters:,} characters\n")
    print("| way | sentences | sentences/s (median) | from – to | characters/s |\n| --- | ---: | ---: | ---: | ---: |")
    for name, make in ways.items():
        count, seconds = 0, []
        for _ in range(arguments.repeats):
            split = make()
            start = time.process_time()
            count = sum(len(split(text)) for text in texts)
            seconds.append(time.process_time() - start)
        speed = [count / each for each in sorted(seconds, reverse=True)]
        middle = statistics.median(speed)
        per_second = characters * middle / count
        print(f"| {name} | {count:,} | {middle:,.0f} | {speed[0]:,.0f} – {speed[-1]:,.0f} | {per_second:,.0f} |")


if __name__ == "__main__":
    main()
