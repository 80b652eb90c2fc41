#!/bin/bash
# After load_state_dict() every epoch of a streaming datasets.IterableDataset starts at the resumed row, not only the first.
#
# Versions: datasets 5.2.0, torchdata 0.11.0, torch 2.13.0.
# Expected: "The iteration will restart at the next example from when the state was saved": the epoch in progress is completed, and the next
#   one is complete again, as it is with a StatefulDataLoader over a plain IterableDataset, and over this one with worker processes.
# What happens: the loaded state stays in the dataset and each new iterator starts from it, until set_epoch() is called. A state
#   saved at the end of an epoch gives empty epochs, without an error. StatefulDataLoader passes its state on to the dataset: with
#   num_workers=0 it inherits this, with workers it does not, because each epoch's workers get fresh copies
#   (persistent ones do not; upstream: datasets issue 7447, closed).
# Seen (10 rows, state saved after 6, three epochs):
#   datasets alone:                       rows [4, 4, 4]
#   state saved at the end of an epoch:   rows [0, 0, 0]
#   with set_epoch() before each epoch:   rows [4, 10, 10]
#   StatefulDataLoader, 0 workers:        rows [4, 4, 4]
#   StatefulDataLoader, 1 worker:         rows [4, 10, 10]
# Why it matters: the usual loop of fine-tuning (`for epoch in range(n): for batch in loader`) sees only the tail of the data after a
#   restart, in every remaining epoch. Nothing is raised; the epochs are only shorter.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 datasets==5.2.0 torchdata==0.11.0 numpy==2.4.6
cat > "$work/epochs.py" <<'PY'
from datasets import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

def dataset():
    return Dataset.from_dict({"row": list(range(10))}).to_iterable_dataset(num_shards=2)

def loader(workers):
    return StatefulDataLoader(dataset(), batch_size=1, num_workers=workers)

def state_after(source, rows):
    for count, _ in enumerate(source, 1):
        if count == rows:
            return source.state_dict()

def epochs(source, state, set_epoch=False):
    source.load_state_dict(state)
    rows = []
    for epoch in range(3):
        if set_epoch:
            source.set_epoch(epoch)
        rows.append(sum(1 for _ in source))
    return rows

if __name__ == "__main__":
    ended = dataset()
    list(ended)
    seen = {
        "datasets alone": epochs(dataset(), state_after(dataset(), 6)),
        "state saved at the end of an epoch": epochs(dataset(), ended.state_dict()),
        "with set_epoch() before each epoch": epochs(dataset(), state_after(dataset(), 6), set_epoch=True),
        "StatefulDataLoader, 0 workers": epochs(loader(0), state_after(loader(0), 6)),
        "StatefulDataLoader, 1 worker": epochs(loader(1), state_after(loader(1), 6)),
    }
    for name, rows in seen.items():
        print(f"{name + ':':37} rows {rows}")
    short, full = [4, 4, 4], [4, 10, 10]
    assert list(seen.values()) == [short, [0, 0, 0], full, short, full], "epochs after a resume have other lengths now"
PY
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/epochs.py"
