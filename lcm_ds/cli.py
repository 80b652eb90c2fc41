"""The verbs of `lcm-ds`: each parses its arguments, loads its config and calls one function of one module.

Exit codes: 0 done; 2 a mistake in the call, a config or the input, one line each on stderr; 75 stopped on request with
a checkpoint saved; 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lcm_ds import __version__
from lcm_ds.errors import InputError, nearest
from lcm_ds.evaluate import add_arguments as add_evaluation
from lcm_ds.processes import exit_with
from lcm_ds.terminal import hide_warnings

EXAMPLES = """\
examples:
  lcm-ds prepare configs/prepare/quickstart.yaml
  lcm-ds launch --local 2 configs/train/quickstart.yaml
  lcm-ds evaluate runs/quickstart
`lcm-ds VERB --help` says more; `lcm-ds configs` lists the files that come with lcm-ds.
"""
Verb = Callable[[argparse.Namespace], "int | None"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    commands = parser.get_default("commands")
    if arguments[0] not in commands and not arguments[0].startswith("-"):
        others = nearest(arguments[0], commands, "; `lcm-ds --help` lists the verbs")
        print(f"lcm-ds: {arguments[0]}: there is no such verb{others}", file=sys.stderr)
        return 2
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes the overrides from one place alone; they may stand behind options, too.
    if unknown := [text for text in rest if text.startswith("-")]:
        known = commands[arguments[0]]._option_string_actions
        for option in unknown:
            others = nearest(option.partition("=")[0], known, f"; `lcm-ds {arguments[0]} --help` lists them")
            print(f"lcm-ds {arguments[0]}: {option}: there is no such option{others}", file=sys.stderr)
        return 2
    if not hasattr(parsed, "overrides"):
        parser.parse_args(arguments)  # says what is wrong
    else:
        parsed.overrides = [*parsed.overrides, *rest]
    if parsed.verb is not train:  # a worker keeps warnings in RUN/log.txt
        hide_warnings()
    try:
        return parsed.verb(parsed) or 0
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not a failure of ours.
        sys.stderr.close()
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="lcm-ds",
        description="Pretrain Base-LCM concept models on DeepSpeed: from text to a trained model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lcm-ds {__version__}")
    commands = parser.add_subparsers(required=True, title="verbs", metavar="VERB")
    parser.set_defaults(commands=commands.choices)

    verb = _verb(commands, "prepare", prepare, "text → dataset; after a kill, goes on where it was",
                 "lcm-ds prepare configs/prepare/quickstart.yaml output=datasets/mine")  # fmt: skip
    _config(verb)

    verb = _verb(commands, "index", index, "adopt WebDataset tars made elsewhere as a dataset",
                 "lcm-ds index 'embeddings-{000..099}.tar' datasets/adopted")  # fmt: skip
    verb.add_argument("shards", metavar="SHARDS", help="a path or URL, with braces for many")
    verb.add_argument("output", metavar="OUT", help="folder for dataset.json, shards.jsonl and the normaliser")
    verb.add_argument("--like", metavar="DATASET", help="one that the same encoder made: encoder, end of text of it")
    verb.add_argument("--encoder", nargs="+", metavar="KEY=VALUE", help="name=…, model=…: what made the concepts")
    verb.add_argument("--extension", default="npy", metavar="EXT", help="of the members with concepts; default: npy")
    verb.add_argument("--texts", default="json:sentences", metavar="EXT[:FIELD]",
                      help="where sentences are: in JSON, or lines of a text; default: json:sentences")  # fmt: skip
    verb.add_argument("--bf16", action="store_true", help="the concepts are bf16, kept as uint16")
    verb.add_argument("--supervised", nargs="?", const="", metavar="SUFFIX",
                      help="JSON has source_sentences (that end with SUFFIX) and target_sentences")  # fmt: skip
    verb.add_argument("--threads", type=int, default=4, metavar="N", help="tars read at a time; default: 4")

    verb = _verb(commands, "inspect", inspect, "what a dataset holds", "lcm-ds inspect datasets/quickstart --verify")
    verb.add_argument("dataset", metavar="DATASET")
    verb.add_argument("--verify", action="store_true", help="re-read every shard against its checksum")
    verb.add_argument("--sample", type=int, default=0, metavar="N", help="print N of its documents")

    verb = _verb(commands, "fit-normalizer", fit_normalizer, "one normaliser for a mixture of datasets",
                 "lcm-ds fit-normalizer datasets/web/train=3 datasets/books/train=1")  # fmt: skip
    verb.add_argument("datasets", metavar="DATASET[=WEIGHT]", nargs="+")
    verb.add_argument(
        "--samples", type=int, default=1_000_000, metavar="N", help="concepts to fit to; default: 1000000"
    )
    verb.add_argument("--output", metavar="FILE", help="write it there; default: into every dataset")

    verb = _verb(commands, "trace", trace, "the documents that a step sees", "lcm-ds trace runs/quickstart --step 120")
    verb.add_argument("run", metavar="RUN|CONFIG", help="a run folder or a train config")
    which = verb.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, metavar="N", help="from 0")
    which.add_argument("--range", type=int, nargs=2, metavar=("A", "B"), help="steps A to B, each with its loss")
    verb.add_argument("--text", action="store_true", help="print the sentences as well")
    _overrides(verb)

    verb = _verb(commands, "train", train, "a worker: one process of a run",
                 "lcm-ds train configs/train/quickstart.yaml steps=20")  # fmt: skip
    verb.add_argument("--dry-run", action="store_true", help="say what the run would be: sizes, memory, steps; and end")
    verb.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: on so many")
    _config(verb)

    verb = _verb(commands, "launch", launch, "start all workers of a run, here or on many hosts",
                 "lcm-ds launch --local 2 configs/train/quickstart.yaml")  # fmt: skip
    verb.usage = "lcm-ds launch (--local N | --hostfile F | --slurm | --openmpi N) [option ...] CONFIG [key=value ...]"
    where = verb.add_argument_group("where, one of").add_mutually_exclusive_group(required=True)
    where.add_argument("--local", type=int, metavar="N", help="N processes on this host")
    where.add_argument("--hostfile", metavar="F", help="hosts in DeepSpeed's format, over pdsh and ssh")
    where.add_argument("--slurm", action="store_true", help="inside an allocation: srun, one task a device")
    where.add_argument("--openmpi", type=int, metavar="N", help="mpirun, N processes")
    meet = verb.add_argument_group("where the workers meet")
    meet.add_argument("--master-addr", metavar="HOST", help="the host of rank 0, where it cannot be told")
    meet.add_argument(
        "--master-port", type=int, metavar="PORT", help="of rank 0; default: 29500, with --local a free one"
    )
    again = verb.add_argument_group("with --hostfile and --local")
    again.add_argument("--max-restarts", type=int, metavar="K", help="after failures; default: 0")
    again.add_argument(
        "--back-off", type=float, metavar="S", help="seconds before the first restart; default: 10, doubling"
    )
    again.add_argument("--grace", type=float, metavar="S", help="seconds from SIGTERM to SIGKILL; default: 30")
    hosts = verb.add_argument_group("with --hostfile")
    hosts.add_argument("--include", default="", metavar="HOSTS", help="these alone, as for DeepSpeed: a@b:0,2")
    hosts.add_argument("--exclude", default="", metavar="HOSTS", help="all but these")
    hosts.add_argument("--ssh-port", type=int, metavar="PORT", help="default: what ssh is configured for")
    hosts.add_argument("--min-hosts", type=int, metavar="M", help="that a restart needs; default: all")
    hosts.add_argument("--silence", type=float, metavar="S", help="seconds until a silent host is lost; default: 15")
    _config(verb)

    verb = _verb(commands, "evaluate", evaluate, "the model against its baselines on the validation split",
                 "lcm-ds evaluate runs/quickstart --json metrics.json")  # fmt: skip
    add_evaluation(verb)
    verb.add_argument("--processes", type=int, metavar="N", help="that share the work; default: one a GPU")

    verb = _verb(commands, "generate", generate, "go on from a text, concept by concept",
                 "lcm-ds generate runs/quickstart --prompt 'Lists are mutable. They grow.'")  # fmt: skip
    verb.add_argument("run", metavar="RUN|FOLDER", help="a run, or an exported model")
    verb.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="again for further prompts")
    verb.add_argument("--prompt-file", action="append", default=[], metavar="F", help="all of it is one prompt")
    verb.add_argument("--interactive", action="store_true", help="read prompts, a line each, until Ctrl-D")
    verb.add_argument("--max-concepts", type=int, default=16, metavar="N", help="default: 16")
    verb.add_argument("--stop-end", default="0.9", metavar="X", help="cosine to the end-of-text concept, or off")
    verb.add_argument("--stop-repeat", default="0.9", metavar="X", help="cosine to the concept before, or off")
    verb.add_argument("--language", metavar="CODE", help="of what comes out, by a decoder; such as fra_Latn")
    verb.add_argument("--prompt-language", metavar="CODE", help="for SONAR; default: the dataset's")
    verb.add_argument("--decoder", metavar="HUB|FOLDER", help="default: the encoder's own, where it has one")
    verb.add_argument("--beams", type=int, default=5, metavar="N", help="of the decoder's search; default: 5")
    verb.add_argument("--dataset", metavar="D", help="to retrieve sentences from; default: the run's own")
    verb.add_argument("--step", type=int, metavar="N", help="of a run's checkpoint; default: the newest")
    verb.add_argument("--device", metavar="D", help="default: cuda where there is one")
    verb.add_argument("--json", metavar="FILE", help="write what is printed there, too")

    verb = _verb(
        commands, "export", export, "a run's model as a Hugging Face folder", "lcm-ds export runs/quickstart model"
    )
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("output", metavar="OUT", help="a new folder")
    verb.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the newest")
    verb.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    verb.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights; default: 5GB")

    verb = _verb(commands, "import-meta", import_meta, "Meta's Base-LCM checkpoint as a Hugging Face folder",
                 "lcm-ds import-meta base_lcm.pt model")  # fmt: skip
    verb.add_argument("checkpoint", metavar="CKPT", help=".pt or .safetensors")
    verb.add_argument("output", metavar="OUT")
    verb.add_argument("--heads", type=int, metavar="N", help="attention heads, where the file does not say")

    verb = _verb(commands, "import-sonar", import_sonar, "SONAR's encoder and decoder from Meta's fairseq2 checkpoints",
                 "lcm-ds import-sonar sonar_text_encoder.pt sonar_text_decoder.pt sonar "
                 "--tokenizer sentencepiece.source.256000.model")  # fmt: skip
    verb.add_argument("encoder", metavar="ENCODER", help=".pt or .safetensors")
    verb.add_argument("decoder", metavar="DECODER", help="the same")
    verb.add_argument("output", metavar="OUT", help="folder for encoder/ and decoder/, as Hugging Face has them")
    verb.add_argument("--tokenizer", metavar="HUB|FOLDER|FILE", help="NLLB's, or its sentencepiece model")
    verb.add_argument("--heads", type=int, metavar="N", help="attention heads; default: one for 64 dimensions")

    verb = _verb(commands, "configs", configs, "the files that come with lcm-ds: list them, copy them",
                 "lcm-ds configs configs/train/150m.yaml mine.yaml")  # fmt: skip
    verb.add_argument("name", metavar="NAME", nargs="?", help="the file to copy; default: list all")
    verb.add_argument("destination", metavar="DEST", nargs="?", help="file or folder; default: NAME, from here")
    verb.add_argument("--all", metavar="FOLDER", help="copy all of them there")

    verb = _verb(commands, "doctor", doctor, "what this machine lacks; what would stop a run",
                 "lcm-ds doctor configs/train/quickstart.yaml")  # fmt: skip
    verb.add_argument("--hostfile", metavar="F", help="ask its hosts what launch would ask them")
    verb.add_argument("--bandwidth", action="store_true", help="measure an all-reduce over all devices")
    verb.add_argument("--master-addr", metavar="HOST", help="the host of rank 0, where it cannot be told")
    verb.add_argument("--master-port", type=int, metavar="PORT")
    verb.add_argument("--ssh-port", type=int, metavar="PORT")
    verb.add_argument("config", metavar="CONFIG", nargs="?", help="a run; default: a table of what this machine has")
    _overrides(verb)
    return parser


def _verb(commands: Any, name: str, run: Verb, says: str, example: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = commands.add_parser(
        name,
        help=says,
        description=says,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # an example stays one line, however long
    )
    verb.set_defaults(verb=run)
    return verb


def _config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", metavar="CONFIG", help="a YAML file")
    _overrides(verb)


def _overrides(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("overrides", metavar="key=value", nargs="*", help="dotted paths into the YAML")


def prepare(arguments: argparse.Namespace) -> int:
    from lcm_ds.prepare import main

    return main(arguments.config, arguments.overrides)


def _tidy_when_ended() -> None:
    """SIGTERM ends this process as an error does, so that what was fetched for a while does not stay behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def index(arguments: argparse.Namespace) -> None:
    from lcm_ds.data.format import Supervised
    from lcm_ds.data.tools.index import index

    _tidy_when_ended()
    encoder = None
    if arguments.encoder is not None:
        if wrong := [text for text in arguments.encoder if "=" not in text]:
            raise InputError([f"--encoder {text}: has to be KEY=VALUE" for text in wrong])
        encoder = dict(text.split("=", 1) for text in arguments.encoder)
    if arguments.threads < 1:
        raise InputError(f"--threads: {arguments.threads} is below 1")
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


def inspect(arguments: argparse.Namespace) -> None:
    from lcm_ds.data.tools.inspect import inspect

    _tidy_when_ended()
    inspect(arguments.dataset, verify=arguments.verify, sample=arguments.sample)


def fit_normalizer(arguments: argparse.Namespace) -> None:
    from lcm_ds.data.tools.fit_normalizer import fit_normalizer

    _tidy_when_ended()
    fit_normalizer(arguments.datasets, arguments.samples, arguments.output)


def trace(arguments: argparse.Namespace) -> None:
    from lcm_ds.train.trace import trace

    first, last = arguments.range or (arguments.step, arguments.step)
    trace(arguments.run, arguments.overrides, first, last, arguments.text)


def train(arguments: argparse.Namespace) -> int:
    from lcm_ds.train import main

    if arguments.ranks is not None and (arguments.ranks < 1 or not arguments.dry_run):
        raise InputError(f"--ranks {arguments.ranks}: has to be 1 or more, and goes with --dry-run")
    return main(arguments.config, arguments.overrides, arguments.dry_run, arguments.ranks)


def launch(arguments: argparse.Namespace) -> int:
    from lcm_ds.launcher.launch import launch
    from lcm_ds.launcher.task import LaunchOptions

    said = {name: vars(arguments)[name] for name in LaunchOptions.__dataclass_fields__}
    return launch(
        arguments.config,
        arguments.overrides,
        local=arguments.local,
        hostfile=arguments.hostfile,
        slurm=arguments.slurm,
        openmpi=arguments.openmpi,
        include=arguments.include,
        exclude=arguments.exclude,
        options=LaunchOptions(**{name: value for name, value in said.items() if value is not None}),
    )


def evaluate(arguments: argparse.Namespace) -> int:
    from lcm_ds.distributed.environment import detect_environment
    from lcm_ds.evaluate import main, worker

    if arguments.processes is not None and arguments.processes < 1:
        raise InputError(f"--processes: {arguments.processes} is below 1")
    if detect_environment(os.environ).world_size > 1:
        return main(arguments)  # a launcher has started this process and others
    processes = arguments.processes
    if processes is None:
        import torch

        processes = max(1, torch.cuda.device_count())
    if processes == 1:
        return main(arguments)
    from lcm_ds.distributed.workers import run_local

    return run_local(worker(arguments), processes)


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

    if arguments.all is not None and arguments.name is not None:
        raise InputError(f"configs: {arguments.name}: copies one file, --all copies all: give one of them")
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
        from lcm_ds.doctor.machine import examine  # which needs nothing that may be broken here

        return examine()
    from lcm_ds.doctor.run_checks import doctor
    from lcm_ds.launcher.task import LaunchOptions

    options = LaunchOptions(
        master_addr=arguments.master_addr, master_port=arguments.master_port, ssh_port=arguments.ssh_port
    )
    return doctor(arguments.config, arguments.overrides, arguments.hostfile, arguments.bandwidth, options)


def entry() -> NoReturn:
    """What the command `lcm-ds` is."""
    exit_with(main)


if __name__ == "__main__":
    entry()
