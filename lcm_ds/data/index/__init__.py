"""documents.idx: `records.py` reads and writes it, `first_use.py` makes it for datasets of earlier versions."""
