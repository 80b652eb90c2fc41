#!/bin/bash
# spaCy's sentencizer never ends a sentence in Gujarati, Malayalam and Armenian.
#
# Versions: spacy 3.8.18.
# Expected: the sentencizer is the rule-based splitter "for all languages": its default marks hold the full stop and the Armenian "։", and
#   spacy.blank() has these three languages. Bengali and Hindi split at their danda.
# What happens: the sentencizer looks for tokens that are a mark. The tokenizers of these languages do not cut "." or "։" off the word before
#   them, so no token is a mark and the document is one sentence. No warning.
# Seen:
#   en 2, bn 2, gu 1, ml 1, hy 1 sentences of two
# Why it matters: SONAR and other multilingual encoders have these languages. A document becomes one "sentence" that the encoder truncates
#   at its limit, so that all that follows is lost, or an embedding of a full page.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet spacy==3.8.18
"$work/venv/bin/python" - <<'PY'
import spacy

texts = {
    "en": "This is one sentence. This is another one.",
    "bn": "এটি একটি বাক্য। এটি আরেকটি।",
    "gu": "આ એક વાક્ય છે. આ બીજું વાક્ય છે.",
    "ml": "ഇത് ഒരു വാക്യമാണ്. ഇത് രണ്ടാമത്തേതാണ്.",
    "hy": "Սա նախադասություն է։ Սա երկրորդն է։",
}
for language, text in texts.items():
    nlp = spacy.blank(language)
    marks = nlp.add_pipe("sentencizer").punct_chars
    doc = nlp(text)
    count = len(list(doc.sents))
    print(language, "sentences:", count, "tokens:", [token.text for token in doc])
    assert text[-1] in marks
    assert count == (2 if language in ("en", "bn") else 1), f"{language} is split in another way now"
PY
