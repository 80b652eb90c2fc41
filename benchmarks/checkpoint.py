"""The time that saving a checkpoint takes from a run, in the foreground and in the background, and the time to resume.

python benchmarks/checkpoint.py                                # CPU: 28.4 M parameters, ZeRO 1 and 3, two ranks
python benchmarks/checkpoint.py --preset 1.6b --ranks 8 --precision bf16 --folder /scratch    # eight GPUs

Real runs of `lcm-ds launch --local` that save after every fourth step; a stall is `checkpoint_time` of the run's
metrics (median, without the last one, which a run waits for). "beside it" is the time of a step during a background
save minus that of a step without one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from loader import write_dataset
from train_step import SMALL

from lcm_ds.config import ModelConfig
from lcm_ds.model.config import resolve_model

ROOT = Path(__file__).parent.parent
EVERY, SAVES = 4, 4


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=None, help="default: 512 wide, 8 layers")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--folder", default=None, help="folder for the checkpoints")
    arguments = parser.parse_args()
    embed_dim = (
        resolve_model(ModelConfig(preset=arguments.preset)).embed_dim if arguments.preset else SMALL["embed_dim"]
    )
    print("| ZeRO | saving | bytes | stall (s) | of the run | beside it (s a step) |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_dataset(Path(folder, "data"), 50_000, embed_dim, 100)
        for stage in arguments.stages:
            for background in (False, True):
                print(row(stage, background, Path(folder), arguments), flush=True)


def row(stage: int, background: bool, folder: Path, arguments: argparse.Namespace) -> str:
    """The row of one run."""
    run = folder / f"run-{stage}-{background}"
    sizes = {"model.preset": arguments.preset} if arguments.preset else {f"model.{k}": v for k, v in SMALL.items()}
    settings = {
        "run_dir": run,
        "data.train": folder / "data",
        "data.validation": "null",
        "data.row_length": 128,
        "batch.rows_per_step": 4 * arguments.ranks,
        "batch.micro_batch_rows": 4,
        "steps": EVERY * (SAVES + 1),
        "optim.schedule.warmup_steps": 0,
        "log.every": 1,
        "checkpoint.every": EVERY,
        "checkpoint.keep": 1,
        "checkpoint.background": str(background).lower(),
        "deepspeed": f"ds_configs/zero{stage}_{arguments.precision}.json",
        **sizes,
    }
    command = [sys.executable, "-m", "lcm_ds.cli", "launch", "--local", str(arguments.ranks)]
    command += [str(ROOT / "configs/train/quickstart.yaml"), *(f"{key}={value}" for key, value in settings.items())]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stalls = [line["checkpoint_time"] for line in lines if "checkpoint_time" in line][:SAVES]
    share = [line["checkpoint_share"] for line in lines if "checkpoint_share" in line][SAVES - 1]
    times = {line["step"]: line["step_time"] for line in lines if "step_time" in line}
    beside = statistics.median(times[EVERY * save + 1] for save in range(1, SAVES + 1))
    undisturbed = statistics.median(times[EVERY * save] for save in range(1, SAVES + 1))
    (checkpoint,) = (path for path in (run / "checkpoints").iterdir() if path.name.startswith("step_"))
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    how = "in the background" if background else "waiting"
    return (
        f"| {stage} | {how} | {size:,} | {statistics.median(stalls):.3f} | {share:.1%} | {beside - undisturbed:+.3f} |"
    )


if __name__ == "__main__":
    main()
