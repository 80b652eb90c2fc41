"""For notebooks and scripts: the commands as functions, with configs as objects.

The same code as behind the commands of `lcm-ds`. Invalid input raises an InputError with a line for each error.

    from lcm_ds.api import PrepareConfig, TrainConfig, evaluate, generate, load, plan, prepare, train

    data = prepare(load(PrepareConfig, "configs/prepare/quickstart.yaml"))
    config = load(TrainConfig, "configs/train/quickstart.yaml", ["steps=50"])
    print("\\n".join(plan(config, ranks=2)))
    run = train(config, processes=2)
    figures = evaluate(run)
    (text,) = generate(run, ["The sea was calm. We set sail at dawn."])
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_ds.config import PrepareConfig, TrainConfig, dump, load
from lcm_ds.data.format import Dataset, open_dataset
from lcm_ds.deepspeed_config import find
from lcm_ds.errors import InputError, PeerFailed, RunFailedError

if TYPE_CHECKING:
    from lcm_ds.generate.text_generator import GeneratedText

__all__ = [
    "InputError", "PrepareConfig", "Prepared", "Run", "TrainConfig",
    "evaluate", "export", "generate", "inspect", "load", "plan", "prepare", "train",
]  # fmt: skip


# Libraries import tqdm's bars for notebooks, which warn if ipywidgets is missing; none of them is shown.
warnings.filterwarnings("ignore", message="IProgress not found")


@dataclass(frozen=True)
class Prepared:
    """The datasets of a preparation."""

    train: Dataset
    validation: Dataset | None  # None if the config sets no documents aside for it


@dataclass(frozen=True)
class Run:
    """A run on disk.

    stopped: `train` was asked to stop before the end of the run and saved a checkpoint; call it again to continue.
    """

    path: Path
    stopped: bool = False

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of RUN/metrics.jsonl, oldest first; keys of validations begin with val_."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def step(self) -> int:
        """The step of its newest checkpoint."""
        from lcm_ds.checkpoint.format import find

        return find(self.path).step


def prepare(config: PrepareConfig) -> Prepared:
    """Text → dataset, as `lcm-ds prepare`; a dataset that is complete already is only opened.

    If a launcher has set RANK and WORLD_SIZE, all its ranks have to call this. Raises InputError, and RunFailedError if
    another rank or process fails.
    """
    from lcm_ds.prepare.pipeline import prepare

    try:
        prepare(config)
    except PeerFailed as error:
        raise RunFailedError(error.message or f"{config.output}: another rank has failed") from None
    out = Path(config.output)
    validation = out / "validation"
    return Prepared(open_dataset(out / "train"), open_dataset(validation) if validation.is_dir() else None)


def train(config: TrainConfig, processes: int = 1) -> Run:
    """Train, or resume from the newest checkpoint, as `lcm-ds launch --local`; only from the main thread.

    Workers' output is printed here. An interrupt or the file RUN/STOP saves a checkpoint and returns a `stopped` run.

    Args:
        config: The run.
        processes: Workers on this host.

    Raises:
        InputError: The config is invalid.
        RunFailedError: The run failed.
    """
    from lcm_ds.launcher.launch import launch
    from lcm_ds.signals import STOPPED

    with _as_file(config) as path, _printed() as output:
        code = launch(path, local=processes, output=output)
    if code == 2:
        raise InputError(f"{config.run_dir}: the workers refused to start; see their output above")
    if code == 1:
        raise RunFailedError(f"{config.run_dir}: failed; see the workers' output above and {config.run_dir}/log.txt")
    return Run(Path(config.run_dir), stopped=code == STOPPED)


def plan(
    config: TrainConfig | PrepareConfig,
    ranks: int | None = None,
    *,
    gpu: str | None = None,
    price_per_gpu_hour: float | None = None,
    **size: Any,
) -> list[str]:
    """What a run or a preparation will take, as the lines of `--dry-run`; its data may be missing.

    Args:
        config: Of `train` or `prepare`.
        ranks: Number of ranks, or GPUs; default: 1, of a preparation `processes`.
        gpu: Of a run: plan for this one, such as h100.
        price_per_gpu_hour: Plan the cost, too.
        size: As the options of --dry-run: of a run `concepts` and `embed_dim`, of a preparation `documents`,
            `sentences`, `embed_dim`, `rate` (sentences per second and GPU) or `measure` (seconds to measure it).

    Raises:
        InputError: With every error in the config and in what is given.
    """
    with _as_file(config) as path:
        if isinstance(config, PrepareConfig):
            from lcm_ds.prepare.dry_run import Given
            from lcm_ds.prepare.dry_run import plan_lines as lines_of_preparation

            return [*lines_of_preparation(path, [], ranks, Given(price_per_gpu_hour=price_per_gpu_hour, **size))]
        from lcm_ds.devices import Prices, gpu_named
        from lcm_ds.train.dry_run import Assumptions, plan_lines, read_run

        prices = Prices(None if gpu is None else gpu_named(gpu), price_per_gpu_hour)
        return [*plan_lines(read_run(path, [], ranks or 1, Assumptions(prices, **size)), ranks or 1, prices)]


def evaluate(run: Run | str | Path, **options: Any) -> dict[str, Any]:
    """Metrics of a run's newest checkpoint and its baselines; options as of `lcm_ds.evaluate.run.evaluate`."""
    from lcm_ds.evaluate.run import evaluate

    return evaluate(_path(run), **options)


def generate(
    run: Run | str | Path,
    prompts: Sequence[str],
    max_concepts: int = 16,
    *,
    step: int | None = None,
    device: str | None = None,
    decoder: str | None = None,
    dataset: str | None = None,
    prompt_language: str | None = None,
    **settings: Any,
) -> list[GeneratedText]:
    """Continue texts, concept by concept, as `lcm-ds generate`.

    To continue several times with one model, keep a `lcm_ds.generate.text_generator.TextGenerator`.

    Args:
        run: A run, or an exported folder.
        prompts: Texts.
        max_concepts: To generate for each prompt, at most.
        step: Of a run's checkpoint; default: the newest.
        device: Default: cuda if available.
        decoder: Hub id or folder; default: the encoder's own, if any.
        dataset: To retrieve sentences from without a decoder; default: the run's training data.
        prompt_language: An NLLB code, for SONAR; default: the dataset's.
        settings: Of `TextGenerator.generate`: stop_end, stop_repeat, language, beams.

    Raises:
        InputError: With every error, before anything is loaded if it can be known then.
    """
    from lcm_ds.generate.text_generator import TextGenerator

    generator = TextGenerator.from_pretrained(
        _path(run), step=step, device=device, decoder=decoder, dataset=dataset, prompt_language=prompt_language
    )
    return generator.generate(prompts, max_concepts, **settings)


def export(
    run: Run | str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
) -> Path:
    """Write a run's model as a Hugging Face folder, as `lcm-ds export`.

    Args:
        run: The run.
        output: A new or empty folder.
        step: Of the checkpoint; default: the newest.
        dtype: Of the weights: float32, bfloat16 or float16.
        max_shard_size: Larger weights are split into several files.

    Returns:
        The folder, for `BaseLCM.from_pretrained`.

    Raises:
        InputError: There is no such run or checkpoint, `output` exists, or an option is malformed.
    """
    from lcm_ds.convert.export import export

    export(_path(run), output, step, dtype, max_shard_size)
    return Path(output)


def inspect(path: str | Path, verify: bool = False) -> dict[str, dict[str, str]]:
    """The summary that `lcm-ds inspect` prints, of each dataset in a folder.

    Args:
        path: A dataset, or the output of `prepare`: a folder or a URL.
        verify: Whether to read every shard first and compare its checksum.

    Returns:
        By path, the lines by name: documents, concepts, encoder, refused, …

    Raises:
        InputError: With every error.
    """
    from lcm_ds.data.tools.inspect import look_at_each, summary

    return dict(look_at_each(path, verify, lambda dataset: (str(dataset.path), summary(dataset))))


def _path(run: Run | str | Path) -> str | Path:
    return run.path if isinstance(run, Run) else run


@contextmanager
def _as_file(config: TrainConfig | PrepareConfig) -> Iterator[Path]:
    """A config in a file, for workers and for errors in which `config` stands for its path."""
    if isinstance(config, TrainConfig) and isinstance(config.deepspeed, str):
        # Its path is relative to this folder, and not to that of the file.
        config = config.model_copy(update={"deepspeed": str(find(config.deepspeed, None).resolve())})
    with tempfile.TemporaryDirectory(prefix="lcm-ds-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump(config), encoding="utf-8")
        try:
            yield path
        except InputError as error:
            raise type(error)(line.replace(str(path), "config") for line in error.errors) from None


@contextmanager
def _printed() -> Iterator[int]:
    """A file descriptor whose lines this process prints: the output of workers reaches a notebook's cell."""
    read_end, write_end = os.pipe()

    def print_lines() -> None:
        with os.fdopen(read_end, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                sys.stdout.write(line)
                sys.stdout.flush()

    printer = threading.Thread(target=print_lines, name="lcm-ds-output")
    printer.start()
    try:
        yield write_end
    finally:
        os.close(write_end)
        printer.join()
