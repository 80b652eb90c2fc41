"""A model on disk, and what is known about its training data: a run's checkpoint or an exported Hugging Face folder.

Evaluation, generation and `model.init_from` all resolve a path with `find_model`. Nothing large is read before `load`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lcm_ds.checkpoint.format import Checkpoint, find, fp32_weights, load_model, load_run_config
from lcm_ds.config import DataConfig, TrainConfig, WeightedPath
from lcm_ds.data.concepts import CONCEPTS, ConceptInfo
from lcm_ds.data.format import DATASET, Dataset, read_info
from lcm_ds.data.index.first_use import open_for_run
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import sha256_of
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.pretrained import read_config, read_folder
from lcm_ds.model.sizes import ModelSizes, Sizes

SEGMENTS_PER_ROW = 8  # of an exported model, which has no row_length


@dataclass(frozen=True)
class ModelSource:
    """A model that was found at a path."""

    path: Path
    config: Sizes
    checkpoint: Checkpoint | None  # None: an exported folder
    run: TrainConfig | None  # config.yaml of the run; None: an exported folder
    info: ConceptInfo | None  # how the model's concepts were made; None: unknown, or not asked for
    info_path: str  # the file that `info` was read from

    @property
    def step(self) -> int | None:
        """The checkpoint's step; None for an exported folder."""
        return None if self.checkpoint is None else self.checkpoint.step

    @property
    def data(self) -> DataConfig:
        """How datasets are opened and cut into rows: as in the run, or by max_segment and defaults."""
        if self.run is not None:
            return self.run.data
        longest = DataConfig.model_fields["max_segment"].default if self.info is None else self.info.max_segment
        lengths = {"row_length": SEGMENTS_PER_ROW * longest, "max_segment": longest}
        return DataConfig.model_validate({"train": str(self.path), **lengths})  # `train` is required, and not used here

    @property
    def training(self) -> list[WeightedPath]:
        """The run's training datasets; empty if they are unknown."""
        return [] if self.run is None else self.run.data.train

    def load(self) -> BaseLCM:
        """The model in fp32 on the CPU, in evaluation mode. Raises InputError if its weights cannot be read."""
        return read_folder(self.path) if self.checkpoint is None else load_model(self.path, self.checkpoint.step)[0]

    def weights(self) -> dict[str, Tensor]:
        """The state dict in fp32. Raises InputError if it cannot be read."""
        return dict(self.load().state_dict()) if self.checkpoint is None else fp32_weights(self.checkpoint)

    def checksum(self) -> str:
        """Changes whenever the weights do."""
        if self.checkpoint is not None:
            return sha256_of(self.checkpoint.path / "COMPLETE")
        return " ".join(sha256_of(weights) for weights in sorted(self.path.glob("*.safetensors")))

    def open_datasets(self, paths: list[str]) -> list[Dataset]:
        """Open datasets as the run would. Raises InputError with one error for each that cannot be opened."""
        errors, opened = Collector(), []
        for path in paths:
            with errors:
                opened.append(open_for_run(path, self.data))
        errors.raise_if_any()
        return opened

    def check_embed_dim(self, dataset: Dataset) -> None:
        """Raise InputError if the dataset's concepts have another size than the model's."""
        if dataset.embed_dim != self.config.embed_dim:
            raise InputError(f"{dataset.path}: embed_dim {dataset.embed_dim}, the model has {self.config.embed_dim}")


def find_model(
    path: str | Path,
    step: int | None = None,
    *,
    needs_info: bool = False,
    dataset: str | None = None,
    weights_only: bool = False,
) -> ModelSource:
    """Find the model of a run or of an exported folder.

    Args:
        path: the folder.
        step: of a run's checkpoint; default: the newest.
        needs_info: require `info`: from concepts.json, or from dataset.json of the run's first training dataset.
        dataset: a dataset to take `info` from if neither is there.
        weights_only: do not read what only evaluation and generation need: the run's config, and concepts.json.

    Raises:
        InputError: with every mistake: there is no model at `path`, no such checkpoint, or `info` cannot be read.
    """
    folder = Path(path)
    if (folder / "config.yaml").is_file():
        return _from_run(folder, step, needs_info, dataset, weights_only)
    if (folder / "config.json").is_file():
        return _from_export(folder, step, needs_info, dataset, weights_only)
    raise InputError(f"{path}: no run here (config.yaml is missing) and no exported model (config.json is missing)")


def _from_run(
    run_dir: Path, step: int | None, needs_info: bool, dataset: str | None, weights_only: bool
) -> ModelSource:
    errors = Collector()
    config = None if weights_only else load_run_config(run_dir)
    info, info_path = None, ""
    with errors:
        checkpoint = find(run_dir, step)
    if needs_info and config is not None:
        with errors:
            info, info_path = _info_of_run(config.data, dataset)
    errors.raise_if_any()
    return ModelSource(run_dir, ModelSizes(**checkpoint.state()["model"]), checkpoint, config, info, info_path)


def _info_of_run(data: DataConfig, dataset: str | None) -> tuple[ConceptInfo, str]:
    """How a run's concepts were made, by its first training dataset or else by `dataset`; and the file it is from."""
    path = data.train[0].path
    try:
        first = read_info(path)
    except InputError as error:
        if dataset is None:
            hint = "name another dataset of the model's encoder with --dataset"
            raise InputError(f"{line}; {hint}" for line in error.errors) from None
        path, first = dataset, read_info(dataset)
    others = []
    for other in data.train[1:]:
        with suppress(InputError):  # a dataset that is no longer available does not matter
            others.append(read_info(other.path))
    return ConceptInfo.of(first, data.max_segment, others), f"{path}/{DATASET}"


def _from_export(
    folder: Path, step: int | None, needs_info: bool, dataset: str | None, weights_only: bool
) -> ModelSource:
    errors = Collector()
    if step is not None:
        errors.errors.append(f"--step {step}: {folder} is an exported model, which has one step only")
    info, info_path = None, str(folder / CONCEPTS)
    with errors:
        config = read_config(folder)
    with errors:
        info = None if weights_only else ConceptInfo.read(folder)
        if info is None and needs_info:
            if dataset is None:
                raise InputError(
                    f"{folder}: {CONCEPTS} is missing, so the encoder of the model's concepts is unknown: "
                    "name a dataset of that encoder with --dataset"
                )
            info, info_path = ConceptInfo.of(read_info(dataset)), f"{dataset}/{DATASET}"
    errors.raise_if_any()
    return ModelSource(folder, config, None, None, info, info_path)
