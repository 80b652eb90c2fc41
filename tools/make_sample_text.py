"""Makes lcm_ds/text/sample_text/books.parquet, the text of the source `sample`, from a folder of books.

    python tools/make_sample_text.py FOLDER

FOLDER holds parquet files with a row per chapter: `text`, `file_path` ("Author/Title") and an `id` that sorts the
chapters of a book. The result is a function of those rows: chapters in the order of a hash of their text, so that the
first N are a fair sample of all books, each with its number of sentences for `take_sentences`.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lcm_ds.config import SentencesConfig
from lcm_ds.text.sample import BOOKS
from lcm_ds.text.splitter import Splitter

TITLES = {
    "Anna Sewell/Black Beauty",
    "Arthur Conan Doyle/The Hound of the Baskervilles",
    "Booker T. Washington/Up from Slavery",
    "Edith Nesbit/The Railway Children",
    "Ernest Shackleton/South!",
    "Frances Hodgson Burnett/The Secret Garden",
    "H.G. Wells/The Invisible Man",
    "Jack London/White Fang",
    "John Stuart Mill/On Liberty",
    "Kenneth Grahame/The Wind in the Willows",
    "L. Frank Baum/The Wonderful Wizard of Oz",
    "Mark Twain/Life on the Mississippi",
    "Mary Hunter Austin/The Land of Little Rain",
    "Mary Wollstonecraft Shelley/Frankenstein",
    "Nellie Bly/Ten Days in a Mad-House",
    "Oscar Wilde/The Happy Prince & Other Tales",
    "Robert Louis Stevenson/Treasure Island",
    "Sarah Orne Jewett/The Country of the Pointed Firs",
    "Willa Cather/My Ántonia",
}
# Chapters that are left out: those with slurs or contempt for a people, one that is a speech, and fragments.
UNFIT = re.compile(
    r"\b(nigg\w*|darke?y|darkies|coons?|chink\w*|injuns?|squaws?|savages|redskins?|half-breeds?|mulatto\w*|blacks|jews?|"
    r"gyps(y|ies)|chinaman|chinamen|kaffirs?|dagos?)\b",
    re.IGNORECASE,
)
SPEECHES = {("Booker T. Washington/Up from Slavery", 14)}
CHARACTERS = range(1_500, 60_000)


def chapters(folder: Path) -> list[dict[str, object]]:
    """The rows of the sample, in their order."""
    books: dict[str, list[tuple[str, str]]] = {title: [] for title in TITLES}
    for path in sorted(folder.glob("*.parquet")):
        for row in pyarrow.parquet.read_table(path, columns=["id", "file_path", "text"]).to_pylist():
            if row["file_path"] in books:
                books[row["file_path"]].append((row["id"], row["text"]))
    missing = [title for title, found in books.items() if not found]
    if missing:
        sys.exit(f"{folder}: has no chapters of {', '.join(missing)}")
    splitter = Splitter(SentencesConfig())  # type: ignore[call-arg]
    rows = []
    for title, found in books.items():
        for number, (_, text) in enumerate(sorted(found), start=1):
            fit = len(text) in CHARACTERS and not UNFIT.search(text) and (title, number) not in SPEECHES
            if fit:
                id = f"{title.replace('/', ': ')}, {number}"
                rows.append({"id": id, "text": text, "sentences": len(splitter.split(text))})
    return sorted(rows, key=lambda row: hashlib.sha256(str(row["text"]).encode()).digest())


def main(folder: Path) -> None:
    """Write the file and print what is in it."""
    rows = chapters(folder)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), BOOKS, compression="zstd", compression_level=19, use_dictionary=False
    )
    counts = Counter(row["id"].rsplit(",", 1)[0] for row in rows)
    print("\n".join(f"{count:4} {title}" for title, count in sorted(counts.items())))
    totals = (sum(len(row["text"]) for row in rows), sum(row["sentences"] for row in rows), BOOKS.stat().st_size)
    print("{} chapters, {:,} characters, {:,} sentences, {:,} bytes".format(len(rows), *totals))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
