"""From text to a trained and measured Base-LCM, in Python: cells of a notebook, or a script (a minute on two cores).

    python examples/first_run.py [FOLDER]      the datasets and the run go into FOLDER, by default ./first_run

Editors open the cells (`# %%`) as a notebook; `jupytext --to notebook examples/first_run.py` makes one.
"""

# %% The configs are objects: from a YAML file with overrides, or made here.
import sys
from pathlib import Path

from lcm_ds.api import PrepareConfig, TrainConfig, evaluate, load, prepare, train

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "first_run")

# %% Text → concepts. The sample is chapters of public-domain books; MiniLM encodes it.
data = prepare(
    PrepareConfig(
        output=str(folder / "dataset"),
        source={"name": "sample", "take_sentences": 3000},
        documents_per_shard=2,
        encoder={"name": "sentence-transformers", "model": "minilm"},
        validation=0.1,
    )
)
totals = data.train.info.totals
print(f"{totals.documents} documents, {totals.concepts} concepts of {data.train.embed_dim} dimensions")

# %% Concepts → a model. Interrupting this cell saves; running it again goes on.
config = load(
    TrainConfig,
    "configs/train/quickstart.yaml",
    [f"run_dir={folder / 'run'}", f"data.train={data.train.path}", f"data.validation={data.validation.path}",
     "steps=60", "optim.schedule.warmup_steps=6", "evaluate.every=20", "checkpoint.every=60"],
)  # fmt: skip
run = train(config, processes=1)

# %% How the loss fell.
for line in run.metrics():
    if "val_loss" in line:
        print(f"step {line['step']:3}: validation loss {line['val_loss']:.3f}")

# %% What the model is worth, beside simple baselines.
figures = evaluate(run)
