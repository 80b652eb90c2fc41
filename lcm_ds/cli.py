"""The commands of `lcm-ds`: each parses its arguments and calls one function of one module.

Exit codes: 0 done; 2 errors in the call, a config or the input, one line each on stderr; 75 stopped on request with
a checkpoint saved; 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lcm_ds import __version__
from lcm_ds.errors import InputError, did_you_mean
from lcm_ds.evaluate import add_arguments as add_evaluation
from lcm_ds.processes import exit_with
from lcm_ds.terminal import hide_warnings

if TYPE_CHECKING:
    from lcm_ds.config import PrepareConfig
    from lcm_ds.devices import Prices
    from lcm_ds.train.dry_run import Assumptions

EXAMPLES = """\
examples:
  lcm-ds prepare configs/prepare/quickstart.yaml
  lcm-ds launch --local 2 configs/train/quickstart.yaml
  lcm-ds evaluate runs/quickstart
`lcm-ds COMMAND --help` shows the options; `lcm-ds configs` lists the files that come with lcm-ds.
"""
# Which DeepSpeed's launcher and torch.distributed.launch put in front of a script's arguments; LOCAL_RANK is used.
_LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")
Command = Callable[[argparse.Namespace], "int | None"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` defaults to the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    commands = parser.get_default("commands")
    while _LOCAL_RANK.fullmatch(arguments[0]) and len(arguments) > 1:
        arguments = arguments[1:]
    name = next((text for text in arguments if text in commands), arguments[0])
    if (option := arguments[0]).startswith("-") and option not in ("-h", "--help", "--version"):
        if name == option or option.partition("=")[0] in commands[name]._option_string_actions:
            print(f"lcm-ds: {option}: options stand behind the command: lcm-ds COMMAND {option} …", file=sys.stderr)
            return 2
    elif option not in commands and not option.startswith("-"):
        suggestion = did_you_mean(option, commands, "; `lcm-ds --help` lists the commands")
        print(f"lcm-ds: unknown command {option!r}{suggestion}", file=sys.stderr)
        return 2
    # argparse accepts overrides in one place only; those that follow further options are left in `rest`.
    parsed, rest = parser.parse_known_args(arguments)
    if unknown := [text for text in rest if text.startswith("-")]:
        known = commands[name]._option_string_actions
        for option in unknown:
            suggestion = did_you_mean(option.partition("=")[0], known, f"; `lcm-ds {name} --help` lists the options")
            print(f"lcm-ds {name}: unknown option {option}{suggestion}", file=sys.stderr)
        return 2
    if hasattr(parsed, "overrides"):
        parsed.overrides = [*parsed.overrides, *rest]
    else:
        parser.parse_args(arguments)  # exits with an error if anything is left
    if parsed.command is not train:  # a worker keeps warnings in RUN/log.txt
        hide_warnings()
    try:
        return parsed.command(parsed) or 0
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output (head, less) has closed it
        sys.stderr.close()
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="lcm-ds",
        description="Pretrain Base-LCM concept models on DeepSpeed: from text to a trained model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lcm-ds {__version__}")
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND")
    parser.set_defaults(commands=commands.choices)

    add = _add_command(commands, "prepare", prepare, "text → dataset; resumes after an interruption",
                       "lcm-ds prepare configs/prepare/quickstart.yaml output=datasets/mine", config=True,
                       ).add_argument  # fmt: skip
    add("--dry-run", action="store_true", help="print sentences, hours and disk instead; the source may be missing")
    add("--ranks", type=int, metavar="N", help="number of processes, or GPUs, of a --dry-run; default: processes, or 1")
    add("--on", choices=["ray"], help="ray: on the Ray cluster that runs (RAY_ADDRESS, ray start), or on this host")
    _add_plan_of_preparation(add)
    _add_prices(add)

    add = _add_command(commands, "index", index, "use WebDataset tars of another program as a dataset",
                       "lcm-ds index 'embeddings-{000..099}.tar' datasets/adopted").add_argument  # fmt: skip
    add("shards", metavar="SHARDS", help="a path or URL, with braces for many")
    add("output", metavar="OUT", help="folder for dataset.json, shards.jsonl and the normaliser")
    add("--like", metavar="DATASET", help="take encoder and end of text from this dataset")
    add("--encoder", nargs="+", metavar="KEY=VALUE", help="name=…, model=…: the encoder of the concepts")
    add("--extension", default="npy", metavar="EXT", help="extension of the concept members; default: npy")
    add("--texts", default="json:sentences", metavar="EXT[:FIELD]",
        help="sentences: a JSON field or the lines of a text; default: json:sentences")  # fmt: skip
    add("--bf16", action="store_true", help="concepts are bf16 stored as uint16")
    add("--supervised", nargs="?", const="", metavar="SUFFIX",
        help="JSON has source_sentences (ending with SUFFIX) and target_sentences")  # fmt: skip
    add("--threads", type=int, default=4, metavar="N", help="tars read at a time; default: 4")

    command = _add_command(commands, "adopt", adopt, "sentences that are encoded already → dataset",
                           "lcm-ds adopt embeddings/ datasets/adopted --encoder name=sonar "
                           "model=cointegrated/SONAR_200_text_encoder")  # fmt: skip
    add = command.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="parquet, .npy, a folder of them, a Hugging Face dataset (folder or hub id)",
    )
    add("output", metavar="OUT", help="folder of the dataset: OUT/train and OUT/validation")
    add("--like", metavar="DATASET", help="take encoder, language and concepts of --end-of-text from this dataset")
    add("--encoder", nargs="+", metavar="KEY=VALUE", help="name=…, model=…: the encoder of the concepts")
    add("--concepts", nargs="+", metavar="COLUMN", help="column of concepts, or of supervised documents two")
    add("--sentences", nargs="+", metavar="COLUMN", help="column of sentences for each")
    add("--end-of-text", nargs="?", const="", metavar="TEXT",
        help="add this concept to each document; default TEXT: End of text.")  # fmt: skip
    add("--source-suffix", nargs="?", const="", metavar="TEXT",
        help="add this concept to each supervised source; default TEXT: [MODEL]:")  # fmt: skip
    add("--processes", type=int, metavar="N", help="default: one for two cores")
    _add_overrides(command)

    add = _add_command(commands, "export-data", export_data, "write a dataset as parquet in the columns of Meta's code",
                       "lcm-ds export-data datasets/quickstart/train train.parquet").add_argument  # fmt: skip
    add("dataset", metavar="DATASET")
    add("output", metavar="OUT.parquet", help="a new file")

    add = _add_command(commands, "inspect", inspect, "summarise a dataset",
                       "lcm-ds inspect datasets/quickstart --verify").add_argument  # fmt: skip
    add("dataset", metavar="DATASET")
    add("--verify", action="store_true", help="compare every shard with its checksum")
    add("--sample", type=int, default=0, metavar="N", help="print N documents")

    add = _add_command(commands, "fit-normalizer", fit_normalizer, "fit one normaliser to a mixture of datasets",
                       "lcm-ds fit-normalizer datasets/web/train=3 datasets/books/train=1").add_argument  # fmt: skip
    add("datasets", metavar="DATASET[=WEIGHT]", nargs="+")
    add("--samples", type=int, default=1_000_000, metavar="N", help="concepts to fit to; default: 1000000")
    add("--output", metavar="FILE", help="default: into every dataset")

    command = _add_command(commands, "trace", trace, "show the documents of a step",
                           "lcm-ds trace runs/quickstart --step 120")  # fmt: skip
    command.add_argument("run", metavar="RUN|CONFIG", help="a run folder or a train config")
    steps = command.add_mutually_exclusive_group(required=True)
    steps.add_argument("--step", type=int, metavar="N", help="counted from 0")
    steps.add_argument("--range", type=int, nargs=2, metavar=("A", "B"), help="steps A to B, each with its loss")
    command.add_argument("--text", action="store_true", help="print the sentences as well")
    _add_overrides(command)

    add = _add_command(commands, "train", train, "run one training worker, under any launcher",
                       "lcm-ds train configs/train/quickstart.yaml steps=20", config=True).add_argument  # fmt: skip
    add("--dry-run", action="store_true", help="print sizes, memory, hours and disk instead; the data may be missing")
    add("--ranks", type=int, metavar="N", help="number of ranks of a --dry-run")
    _add_plan_of_run(add)

    command = _add_command(commands, "launch", launch, "start all workers of a run, on this host or many",
                           "lcm-ds launch --local 2 configs/train/quickstart.yaml", config=True)  # fmt: skip
    command.usage = "lcm-ds launch (--local N | --hostfile F | --slurm | --mpi N) [option ...] CONFIG [key=value ...]"
    add = command.add_argument_group("launcher (choose one)").add_mutually_exclusive_group(required=True).add_argument
    add("--local", type=int, metavar="N", help="N processes on this host")
    add("--hostfile", metavar="F", help="hosts in DeepSpeed's format, over pdsh and ssh")
    add("--slurm", action="store_true", help="srun inside an allocation, one task per device")
    add("--mpi", type=int, metavar="N", help="mpirun of Open MPI, MPICH or Intel MPI, N processes")
    add("--openmpi", type=int, metavar="N", help="the same, only with Open MPI's mpirun")
    add = command.add_argument_group("rendezvous").add_argument
    add("--master-addr", metavar="HOST", help="host of rank 0, if it cannot be detected")
    add("--master-port", type=int, metavar="PORT", help="port on that host; default: 29500, with --local any free port")
    add = command.add_argument_group("with --hostfile and --local").add_argument
    add("--max-restarts", type=int, metavar="K", help="restarts after failures; default: 0")
    add("--back-off", type=float, metavar="S", help="seconds before a restart; default: 10")
    add("--grace", type=float, metavar="S", help="seconds from SIGTERM to SIGKILL; default: 30")
    add = command.add_argument_group("with --hostfile").add_argument
    add("--include", default="", metavar="HOSTS", help="only these, in DeepSpeed's syntax: a@b:0,2")
    add("--exclude", default="", metavar="HOSTS", help="all but these")
    add("--ssh-port", type=int, metavar="PORT", help="default: from the ssh configuration")
    add("--min-hosts", type=int, metavar="M", help="minimum hosts for a restart; default: all")
    add(
        "--exclude-stragglers",
        action="store_true",
        help="at a restart, leave out hosts of slow ranks (guard.straggler)",
    )
    add("--silence", type=float, metavar="S", help="seconds without a heartbeat until a host is lost; default: 15")

    add = command.add_argument
    add("--json", action="store_true", help="print events as lines of JSON on stdout, and all else on stderr")
    add("--dry-run", action="store_true", help="print the plan of that many workers; options as of prepare and train")
    _add_plan_of_run(_hidden(add))
    _add_plan_of_preparation(_hidden(add))

    command = _add_command(commands, "evaluate", evaluate, "compare the model with baselines on the validation split",
                           "lcm-ds evaluate runs/quickstart --json metrics.json")  # fmt: skip
    add_evaluation(command)
    command.add_argument("--processes", type=int, metavar="N", help="number of processes; default: one per GPU")

    add = _add_command(commands, "compare", compare, "several runs on the same targets, with paired differences",
                       "lcm-ds compare runs/small runs/large --figure comparison.png").add_argument  # fmt: skip
    add("runs", metavar="RUN|FOLDER", nargs="+", help="two or more; differences are to the first")
    add("--dataset", metavar="DATASET", help="default: the validation dataset that all runs have")
    add("--json", metavar="FILE", help="also write the result to FILE")
    add("--figure", metavar="FILE.png", help="also plot it to FILE.png")
    add("--no-baselines", action="store_true", help="do not fit the best linear baseline of each run")

    add = _add_command(commands, "generate", generate, "continue a text, concept by concept",
                       "lcm-ds generate runs/quickstart --prompt 'The sea was calm. We set sail at dawn.'",
                       ).add_argument  # fmt: skip
    add("run", metavar="RUN|FOLDER", help="a run, or an exported model")
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeat for several prompts")
    add("--prompt-file", action="append", default=[], metavar="F", help="a file that is one prompt")
    add("--interactive", action="store_true", help="read prompts line by line until Ctrl-D")
    add("--max-concepts", type=int, default=16, metavar="N", help="default: 16")
    add("--stop-end", default="0.9", metavar="X", help="cosine to the end-of-text concept, or off; default: 0.9")
    add("--stop-repeat", default="0.9", metavar="X", help="cosine to the previous concept, or off; default: 0.9")
    add("--language", metavar="CODE", help="output language of the decoder, such as fra_Latn")
    add("--prompt-language", metavar="CODE", help="for SONAR; default: the dataset's")
    add("--decoder", metavar="HUB|FOLDER", help="default: the encoder's own decoder, if any")
    add("--beams", type=int, default=5, metavar="N", help="beam width of the decoder; default: 5")
    add("--dataset", metavar="D", help="dataset to retrieve sentences from; default: the run's")
    add("--step", type=int, metavar="N", help="checkpoint of a run; default: the newest")
    add("--device", metavar="D", help="default: cuda if available")
    add("--json", metavar="FILE", help="also write the output there")

    add = _add_command(commands, "export", export, "write a run's model as a Hugging Face folder",
                       "lcm-ds export runs/quickstart model").add_argument  # fmt: skip
    add("run", metavar="RUN")
    add("output", metavar="OUT", help="a new folder")
    add("--step", type=int, metavar="N", help="checkpoint; default: the newest")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="maximum size of a weights file; default: 5GB")

    add = _add_command(commands, "import-meta", import_meta, "convert a Base-LCM checkpoint of Meta's code",
                       "lcm-ds import-meta base_lcm.pt model").add_argument  # fmt: skip
    add("checkpoint", metavar="CKPT", help=".pt or .safetensors")
    add("output", metavar="OUT")
    add("--heads", type=int, metavar="N", help="attention heads, if not in the file")

    add = _add_command(commands, "import-sonar", import_sonar, "convert SONAR from fairseq2 checkpoints",
                       "lcm-ds import-sonar sonar_text_encoder.pt sonar_text_decoder.pt sonar "
                       "--tokenizer sentencepiece.source.256000.model").add_argument  # fmt: skip
    add("encoder", metavar="ENCODER", help=".pt or .safetensors")
    add("decoder", metavar="DECODER", help=".pt or .safetensors")
    add("output", metavar="OUT", help="folder for encoder/ and decoder/ in Hugging Face format")
    add("--tokenizer", metavar="HUB|FOLDER|FILE", help="NLLB's tokenizer, or its sentencepiece model")
    add("--heads", type=int, metavar="N", help="attention heads; default: one per 64 dimensions")

    add = _add_command(commands, "configs", configs, "list or copy the files that come with lcm-ds",
                       "lcm-ds configs configs/train/150m.yaml mine.yaml").add_argument  # fmt: skip
    add("name", metavar="NAME", nargs="?", help="file to copy; default: list all")
    add("destination", metavar="DEST", nargs="?", help="file or folder; default: NAME in this folder")
    add("--all", metavar="FOLDER", help="copy all files there")
    add("--reference", action="store_true", help="print every key of the configs, as docs/configuration.md")
    add("--schema", choices=("prepare", "train"), help="print the JSON Schema of these configs, for editors")

    command = _add_command(commands, "doctor", doctor, "check this machine, or everything a run needs",
                           "lcm-ds doctor configs/train/quickstart.yaml")  # fmt: skip
    add = command.add_argument
    add("--hostfile", metavar="F", help="run the checks of launch on these hosts")
    add("--bandwidth", action="store_true", help="measure an all-reduce over all devices")
    add("--master-addr", metavar="HOST", help="host of rank 0, if it cannot be detected")
    add("--master-port", type=int, metavar="PORT")
    add("--ssh-port", type=int, metavar="PORT")
    _add_plan_of_run(add)
    add("config", metavar="CONFIG", nargs="?", help="check this run; default: check this machine")
    _add_overrides(command)
    return parser


def _add_command(
    commands: Any, name: str, run: Command, summary: str, example: str, config: bool = False
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # does not wrap the example
    )
    command.set_defaults(command=run)
    if config:
        command.epilog = f"{command.epilog}\nkeys of CONFIG: docs/configuration.md, or lcm-ds configs --reference"
        command.add_argument("config", metavar="CONFIG", help="a YAML file")
        _add_overrides(command)
    return command


def _hidden(add: Any) -> Any:
    """Adds options that the help of a command leaves to that of others."""
    return lambda name, **settings: add(name, **{**settings, "help": argparse.SUPPRESS})


def _add_plan_of_run(add: Any) -> None:
    """Options of a run's plan: PLAN_OF_RUN."""
    add("--gpu", metavar="NAME", help="plan for this one: h100, h200, a100, rtx-4090, …")
    add("--concepts", type=_count, metavar="N", help="plan for this much data: 500M")
    _add_prices(add)


def _add_prices(add: Any) -> None:
    add("--price-per-gpu-hour", type=float, metavar="X", help="plan the cost, too")
    add("--embed-dim", type=int, metavar="D", help="default: the model's or the encoder's")


def _add_plan_of_preparation(add: Any) -> None:
    """Options of a preparation's plan: PLAN_OF_PREPARATION."""
    add("--documents", type=_count, metavar="N", help="plan for a source of this size: 9.7M")
    add("--sentences", type=_count, metavar="N", help="the same, by its sentences")
    add("--rate", type=_number, metavar="R", help="plan with this many sentences per second and GPU")
    add("--measure", type=_seconds, metavar="S", help="measure the rate here for this long: 30s")


def _number(text: str) -> float:
    """A number above 0 with k, M, G (or B) or T behind it."""
    match = re.fullmatch(r"(\d[\d,_]*(?:\.\d+)?)\s*([kKMGBT]?)", text)
    number = float(match[1].replace(",", "").replace("_", "")) if match else 0.0
    if not match or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} has to be a number above 0, such as 500M or 57G")
    return number * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}[match[2].upper()]


def _count(text: str) -> int:
    """A whole number, likewise."""
    return max(1, round(_number(text)))


def _seconds(text: str) -> float:
    """A number of seconds, with s or without, or of minutes with m."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([sm]?)", text)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} has to be a time above 0, such as 30s or 2m")
    return float(match[1]) * (60 if match[2] == "m" else 1)


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", metavar="key=value", nargs="*", help="dotted paths into the YAML")


def prepare(arguments: argparse.Namespace) -> int:
    from lcm_ds.prepare import main

    if arguments.ranks is not None and (arguments.ranks < 1 or not arguments.dry_run):
        raise InputError(f"--ranks {arguments.ranks}: has to be 1 or more, and goes with --dry-run")
    _only_for_plans(arguments, PLAN_OF_PREPARATION)
    if arguments.dry_run:
        return _plan_preparation(arguments, arguments.ranks)
    return main(arguments.config, arguments.overrides, _on_ray if arguments.on == "ray" else None)


def _on_ray(config: PrepareConfig) -> None:
    from lcm_ds.integrations.ray import prepare  # imports torch, which takes seconds

    prepare(config)


def _plan_preparation(arguments: argparse.Namespace, ranks: int | None) -> int:
    """Print the plan of a preparation."""
    from lcm_ds.prepare.dry_run import Given, dry_run

    given = Given(
        documents=arguments.documents,
        sentences=arguments.sentences,
        embed_dim=arguments.embed_dim,
        rate=arguments.rate,
        measure=arguments.measure,
        price_per_gpu_hour=arguments.price_per_gpu_hour,
    )
    dry_run(arguments.config, arguments.overrides, ranks, given)
    return 0


def _clean_up_on_sigterm() -> None:
    """Exit on SIGTERM as on an error, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _encoder(words: Sequence[str] | None) -> dict[str, str] | None:
    """The option --encoder KEY=VALUE ... Raises InputError."""
    if words is None:
        return None
    if invalid := [text for text in words if "=" not in text]:
        raise InputError([f"--encoder {text}: has to be KEY=VALUE" for text in invalid])
    return dict(text.split("=", 1) for text in words)


def index(arguments: argparse.Namespace) -> None:
    from lcm_ds.data.format import Supervised
    from lcm_ds.data.tools.index import index

    _clean_up_on_sigterm()
    encoder = _encoder(arguments.encoder)
    if arguments.threads < 1:
        raise InputError(f"--threads: has to be 1 or more, not {arguments.threads}")
    index(
        arguments.shards,
        arguments.output,
        encoder,
        arguments.like,
        arguments.extension,
        arguments.texts,
        arguments.bf16,
        threads=arguments.threads,
        supervised=None if arguments.supervised is None else Supervised(source_suffix=arguments.supervised or None),
    )


def adopt(arguments: argparse.Namespace) -> int:
    from lcm_ds.adopt.command import adoption_config
    from lcm_ds.prepare import run

    return run(
        lambda: adoption_config(
            arguments.source,
            arguments.output,
            encoder=_encoder(arguments.encoder),
            like=arguments.like,
            concepts=arguments.concepts or [],
            sentences=arguments.sentences or [],
            end_of_text=arguments.end_of_text,
            source_suffix=arguments.source_suffix,
            processes=arguments.processes,
            overrides=arguments.overrides,
        )
    )


def export_data(arguments: argparse.Namespace) -> None:
    from lcm_ds.adopt.export import export_data

    _clean_up_on_sigterm()
    export_data(arguments.dataset, arguments.output)


def inspect(arguments: argparse.Namespace) -> None:
    from lcm_ds.data.tools.inspect import inspect

    _clean_up_on_sigterm()
    inspect(arguments.dataset, verify=arguments.verify, sample=arguments.sample)


def fit_normalizer(arguments: argparse.Namespace) -> None:
    from lcm_ds.data.tools.fit_normalizer import fit_normalizer

    _clean_up_on_sigterm()
    fit_normalizer(arguments.datasets, arguments.samples, arguments.output)


def trace(arguments: argparse.Namespace) -> None:
    from lcm_ds.train.trace import trace

    first, last = arguments.range or (arguments.step, arguments.step)
    trace(arguments.run, arguments.overrides, first, last, arguments.text)


def train(arguments: argparse.Namespace) -> int:
    if arguments.ranks is not None and (arguments.ranks < 1 or not arguments.dry_run):
        raise InputError(f"--ranks {arguments.ranks}: has to be 1 or more, and goes with --dry-run")
    _only_for_plans(arguments, PLAN_OF_RUN)
    if not arguments.dry_run:
        from lcm_ds.train import main

        return main(arguments.config, arguments.overrides)
    from lcm_ds.distributed.environment import detect_environment
    from lcm_ds.train.dry_run import dry_run

    env = detect_environment(os.environ)
    if env.rank == 0:
        dry_run(arguments.config, arguments.overrides, arguments.ranks or env.world_size, _assumptions(arguments))
    return 0


PLAN_OF_RUN = ("gpu", "price_per_gpu_hour", "concepts", "embed_dim")
PLAN_OF_PREPARATION = ("documents", "sentences", "rate", "measure", "price_per_gpu_hour", "embed_dim")


def _only_for_plans(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise InputError for options of a plan without --dry-run."""
    if not arguments.dry_run and (given := [name for name in names if getattr(arguments, name) is not None]):
        raise InputError(f"--{name.replace('_', '-')}: goes with --dry-run" for name in given)


def _assumptions(arguments: argparse.Namespace) -> Assumptions:
    """What the options of a plan take as given. Raises InputError."""
    from lcm_ds.train.dry_run import Assumptions

    return Assumptions(_prices(arguments), arguments.concepts, arguments.embed_dim)


def _prices(arguments: argparse.Namespace) -> Prices:
    from lcm_ds.devices import Prices, gpu_named

    return Prices(None if arguments.gpu is None else gpu_named(arguments.gpu), arguments.price_per_gpu_hour)


def launch(arguments: argparse.Namespace) -> int:
    from lcm_ds.distributed.events import events
    from lcm_ds.launcher.launch import launch, planned_ranks
    from lcm_ds.launcher.task import LaunchOptions

    _only_for_plans(arguments, (*PLAN_OF_RUN, *PLAN_OF_PREPARATION))
    ways = ("local", "hostfile", "slurm", "mpi", "openmpi", "include", "exclude")
    way = {name: getattr(arguments, name) for name in ways}
    if arguments.dry_run:
        return _plan_launch(arguments, planned_ranks(**way))
    options = {name: vars(arguments)[name] for name in LaunchOptions.__dataclass_fields__}
    given = LaunchOptions(**{name: value for name, value in options.items() if value is not None})
    if arguments.json:
        events.take_stdout()
    code = 1
    try:
        code = launch(arguments.config, arguments.overrides, **way, options=given)
    except InputError as error:
        code = error.exit_code
        raise
    finally:
        events.emit("end", code=code)
    return code


def _plan_launch(arguments: argparse.Namespace, ranks: int) -> int:
    """Print the plan of a run or a preparation with this number of workers."""
    from lcm_ds.config import read_yaml

    is_preparation = "source" in read_yaml(arguments.config, arguments.overrides)
    own = PLAN_OF_PREPARATION if is_preparation else PLAN_OF_RUN
    given = [name for name in (*PLAN_OF_RUN, *PLAN_OF_PREPARATION) if getattr(arguments, name) is not None]
    if wrong := [name for name in given if name not in own]:
        kind = "preparation" if is_preparation else "run"
        raise InputError(f"--{name.replace('_', '-')}: is not for a {kind}; leave it out" for name in wrong)
    if is_preparation:
        return _plan_preparation(arguments, ranks)
    from lcm_ds.train.dry_run import dry_run

    dry_run(arguments.config, arguments.overrides, ranks, _assumptions(arguments))
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from lcm_ds.distributed.environment import detect_environment
    from lcm_ds.evaluate import main, worker

    if arguments.processes is not None and arguments.processes < 1:
        raise InputError(f"--processes: has to be 1 or more, not {arguments.processes}")
    if detect_environment(os.environ).world_size > 1:
        return main(arguments)  # started by a launcher, with others
    processes = arguments.processes
    if processes is None:
        import torch

        processes = max(1, torch.cuda.device_count())
    if processes == 1:
        return main(arguments)
    from lcm_ds.distributed.workers import run_local

    return run_local(worker(arguments), processes)


def compare(arguments: argparse.Namespace) -> None:
    from lcm_ds.evaluate.compare import compare

    compare(arguments.runs, arguments.dataset, arguments.json, arguments.figure, not arguments.no_baselines)


def generate(arguments: argparse.Namespace) -> None:
    from lcm_ds.generate.command import run

    run(
        arguments.run,
        prompts=arguments.prompt,
        prompt_files=arguments.prompt_file,
        interactive=arguments.interactive,
        max_concepts=arguments.max_concepts,
        stop_end=arguments.stop_end,
        stop_repeat=arguments.stop_repeat,
        language=arguments.language,
        beams=arguments.beams,
        json_path=arguments.json,
        step=arguments.step,
        device=arguments.device,
        decoder=arguments.decoder,
        dataset=arguments.dataset,
        prompt_language=arguments.prompt_language,
    )


def export(arguments: argparse.Namespace) -> None:
    from lcm_ds.convert.export import export

    export(arguments.run, arguments.output, arguments.step, arguments.dtype, arguments.max_shard_size)


def import_meta(arguments: argparse.Namespace) -> None:
    from lcm_ds.convert.base_lcm import import_meta

    import_meta(arguments.checkpoint, arguments.output, arguments.heads)


def import_sonar(arguments: argparse.Namespace) -> None:
    from lcm_ds.convert.sonar import import_sonar

    import_sonar(arguments.encoder, arguments.decoder, arguments.output, arguments.tokenizer, arguments.heads)


def configs(arguments: argparse.Namespace) -> None:
    from lcm_ds import resources

    if arguments.reference or arguments.schema:
        from lcm_ds import reference

        if arguments.name or arguments.all or (arguments.reference and arguments.schema):
            raise InputError("configs: give --reference or --schema alone")
        text = (
            reference.page() if arguments.reference else json.dumps(reference.json_schema(arguments.schema), indent=2)
        )
        print(text.rstrip())
        return
    if arguments.all is not None and arguments.name is not None:
        raise InputError(f"configs: give either {arguments.name}, to copy one file, or --all, to copy all")
    if arguments.all is not None:
        copied = resources.copy(resources.names(), arguments.all)
    elif arguments.name is not None:
        copied = resources.copy([arguments.name], arguments.destination)
    else:
        width = max(map(len, resources.names()))
        for name in resources.names():
            print(f"{name:{width}}  {resources.description(name)}")
        return
    for path in copied:
        print(f"copied to {path}")


def doctor(arguments: argparse.Namespace) -> int:
    if not (arguments.config or arguments.hostfile or arguments.bandwidth):
        from lcm_ds.doctor.machine import examine  # imports nothing that may be broken here

        return examine()
    from lcm_ds.doctor.run_checks import doctor
    from lcm_ds.launcher.task import LaunchOptions

    if arguments.config is None and (given := [name for name in PLAN_OF_RUN if getattr(arguments, name) is not None]):
        raise InputError(f"--{name.replace('_', '-')}: needs a CONFIG" for name in given)
    options = LaunchOptions(
        master_addr=arguments.master_addr, master_port=arguments.master_port, ssh_port=arguments.ssh_port
    )
    return doctor(
        arguments.config,
        arguments.overrides,
        arguments.hostfile,
        arguments.bandwidth,
        options,
        _assumptions(arguments),
    )


def entry() -> NoReturn:
    """The console script `lcm-ds`."""
    exit_with(main)


if __name__ == "__main__":
    entry()
