#!/bin/bash
# transformers saves the truncation of the last call into tokenizer.json; the tokenizers library then cuts every text.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3.
# Expected: truncation=True, max_length=4 are arguments of one call. save_pretrained() writes the tokenizer, the same file whatever it was last
#   asked, and both libraries read the same file in the same way.
# What happens: the call sets the truncation on the tokenizer beneath, where it stays. save_pretrained() writes it, and padding likewise.
#   tokenizers.Tokenizer.from_file() obeys it and cuts all later texts to 4 tokens; transformers' own loader ignores it.
# Seen:
#   tokenizer.json: "truncation": {"direction": "Right", "max_length": 4, ...}
#   8 words: transformers reads 8 tokens from the folder, tokenizers reads 4
# Why it matters: a training script tokenises one short prompt with a limit and then saves model and tokenizer. Python tests pass, and servers that
#   read tokenizer.json with the Rust library (embedding servers do) embed the first few words of each text. Nothing reports it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import json
import sys

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = f"{sys.argv[1]}/saved"
text = "a b c d e f g h"
words = Tokenizer(WordLevel({word: row for row, word in enumerate(["[UNK]", *text.split()])}, unk_token="[UNK]"))
words.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")

def saved():
    tokenizer.save_pretrained(folder)
    with open(f"{folder}/tokenizer.json") as file:
        truncation = json.load(file)["truncation"]
    return truncation, len(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]), len(Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text).ids)

print("before (truncation, tokens by transformers, by tokenizers):", saved())
assert saved() == (None, 8, 8)
tokenizer(text, truncation=True, max_length=4)
print("after one call with a limit:", saved())
truncation, by_transformers, by_tokenizers = saved()
assert truncation and truncation["max_length"] == 4, "the call's limit is no longer saved"
assert by_transformers == 8 and by_tokenizers == 4, "both libraries agree now"
PY
