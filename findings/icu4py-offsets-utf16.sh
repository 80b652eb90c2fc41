#!/bin/bash
# icu4py: the offsets of SentenceBreaker.segments() count UTF-16 code units, so they do not index a str with a rare ideograph.
#
# Versions: icu4py 1.2.0 (ICU 78, from its wheel).
# Expected: offsets into the str that was given, as Python's own re gives them: text[start:end] is the segment.
# What happens: behind each character beyond U+FFFF the offsets are one too large: slices begin late and take the first
#   character of the next sentence. Iterating over the breaker gives the right pieces.
# Seen (a Chinese text with one ideograph of the extension B, used in names):
#   iterating: ['𠮷野先生来了。', '他很高兴。']
#   slices of segments(): ['𠮷野先生来了。他', '很高兴。']
# Why it matters: ICU is the usual fast splitter for many languages; corpora of Chinese, Cantonese and Japanese names, of Gothic or of
#   mathematics have such characters, and each of them shifts all later sentences of its text, silently.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet icu4py==1.2.0
"$work/venv/bin/python" - <<'PY'
from icu4py.breakers import SentenceBreaker

text = "\U00020bb7野先生来了。他很高兴。"
pieces = [str(piece) for piece in SentenceBreaker(text, "zh")]
found = [(each.start, each.end) if hasattr(each, "start") else each for each in SentenceBreaker(text, "zh").segments()]
slices = [text[a:b] for a, b in found]
print("iterating:", pieces)
print("slices of segments():", slices)
assert pieces == ["\U00020bb7野先生来了。", "他很高兴。"]
assert slices == ["\U00020bb7野先生来了。他", "很高兴。"], "the offsets have changed"
PY
