#!/bin/bash
# spaCy's sentencizer does not end a sentence at "...", although it does at ".", "!!!" and ". . .".
#
# Versions: spacy 3.8.18.
# Expected: "." is one of the sentencizer's punct_chars and a run of them ends a sentence, as a run of "!" does.
# What happens: the sentencizer compares complete tokens with its list of single characters. The tokenizers split "!!!" into three
#   tokens, but keep two or more dots in one ("...", "...."), which is not in the list. "…" is not in it either.
#   The sentence goes on to the next plain mark. Names that end in a dot, as in "Inc." or "U.S.", are single tokens as well.
# Seen:
#   'He waited. Then he left.'      2 sentences
#   'He waited!!! Then he left.'    2
#   'He waited . . . Then he left.' 2
#   'He waited... Then he left.'    1
#   'He waited.... Then he left.'   1
#   'He waited… Then he left.'      1
#   with "..." and "…" added to punct_chars: 2, and 1 for four dots
# Why it matters: fiction, dialogue and web text are full of it. Two or more sentences become one concept, often over the encoder's
#   length, and nothing shows it but the length.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet spacy==3.8.18
"$work/venv/bin/python" - <<'PY'
import spacy
from spacy.pipeline import Sentencizer

def count(text, language="en", **config):
    nlp = spacy.blank(language)
    nlp.add_pipe("sentencizer", config=config)
    return len(list(nlp(text).sents))

for mark, expected in {".": 2, "!!!": 2, " . . .": 2, "...": 1, "....": 1, "…": 1}.items():
    text = f"He waited{mark} Then he left."
    sentences = count(text)
    print(f"{text!r:32}{sentences} sentences")
    assert sentences == expected, "the sentencizer ends sentences elsewhere now"
for language, text in {"de": "Er wartete... Dann ging er.", "fr": "Il attendait... Puis il partit.", "es": "Esperó... Luego se fue."}.items():
    assert count(text, language) == 1
more = [*Sentencizer.default_punct_chars, "...", "…"]
added = {mark: count(f"He waited{mark} Then he left.", punct_chars=more) for mark in ("...", "…", "....")}
print("with two more punct_chars:", added)
assert added == {"...": 2, "…": 2, "....": 1}
PY
