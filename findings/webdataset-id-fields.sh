#!/bin/bash
# webdataset's decoder turns the field "id" into an integer: the ids 0012 and 12 become one, a UUID stops the reader.
#
# Versions: webdataset 1.0.2, numpy 2.4.6.
# Expected: a string that TarWriter accepts under a field of one's own choice comes back as that string, as it does under "name", which no
#   decoder claims. (A field without a decoder comes back as bytes.)
# What happens: TarWriter writes the fields cls, cls2, class, count, index, inx and id as text, whatever the value is. decode() reads five of
#   them (not class and count) with int(), and Python's int() takes leading zeros, spaces and underscores without complaint.
# Seen:
#   written ['0012', '12', '1_000']
#   read    [12, 12, 1000]
#   name    [b'0012', b'12', b'1_000']
#   an id that is no number: DecodingError, which names the field
# Why it matters: "id" is the column of document ids in FineWeb and most corpora. Where ids are digits of a fixed width, documents can no
#   longer be found by them or told apart, and a split made by hash(id) changes sides after one round trip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet webdataset==1.0.2 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import webdataset
from webdataset.autodecode import DecodingError

def round_trip(ids):
    path = f"{sys.argv[1]}/documents.tar"
    with webdataset.TarWriter(path) as writer:
        for number, name in enumerate(ids):
            writer.write({"__key__": f"document{number}", "id": name, "name": name.encode()})
    return list(webdataset.WebDataset(path, shardshuffle=False).decode())

written = ["0012", "12", "1_000"]
samples = round_trip(written)
read = [sample["id"] for sample in samples]
print("written", written)
print("read   ", read)
print("name   ", [sample["name"] for sample in samples])
assert read == [12, 12, 1000], "ids are strings now"
assert [sample["name"].decode() for sample in samples] == written
try:
    round_trip(["c4ca4238-a0b9-3382-8dcc-509a6f75849b"])
except DecodingError as error:
    print("an id that is no number:", type(error).__name__, error.k)
else:
    raise SystemExit("ids that are no numbers are read now")
PY
