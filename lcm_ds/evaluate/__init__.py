"""Evaluation: a model against its baselines."""

from __future__ import annotations

import argparse
import os
import sys

from lcm_ds.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lcm-ds evaluate` and of its workers."""
    parser.add_argument("run", metavar="RUN|FOLDER", help="a run, or an exported model")
    parser.add_argument("--dataset", metavar="DATASET", help="default: the run's validation dataset")
    parser.add_argument("--step", type=int, metavar="N", help="of a run's checkpoint; default: the newest")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--figure", metavar="FILE.png", help="draw the error by position there, too")
    parser.add_argument("--decoder", metavar="HUB|FOLDER", help="for ℓ2 round trip and MI; default: the encoder's own")
    parser.add_argument("--causal-lm", metavar="HUB|FOLDER", help="for MI; the paper's is openai-community/gpt2")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="targets that are decoded; default: 256")


def worker(arguments: argparse.Namespace) -> list[str]:
    """The command of a process that does the same, of which a launcher starts as many as it likes."""
    options = ("dataset", "step", "json", "figure", "decoder", "causal_lm", "samples")
    said = {option: vars(arguments)[option] for option in options}
    words = [[f"--{option.replace('_', '-')}", str(value)] for option, value in said.items() if value is not None]
    return [sys.executable, "-m", "lcm_ds.evaluate", arguments.run, *(word for pair in words for word in pair)]


def main(arguments: argparse.Namespace) -> int:
    """A rank of an evaluation, from the environment its launcher set, or all of it; returns the exit code."""
    from lcm_ds.distributed.environment import detect_environment, exit_with_launcher

    exit_with_launcher(os.environ)
    speaks = True
    try:
        place = detect_environment(os.environ)
        speaks = place.local_rank == 0  # one process a host says what is wrong
        from lcm_ds.evaluate.run import evaluate

        evaluate(
            arguments.run,
            arguments.dataset,
            arguments.json,
            step=arguments.step,
            figure=arguments.figure,
            causal_lm=arguments.causal_lm,
            decoder=arguments.decoder,
            samples=arguments.samples,
            place=place,
        )
        return 0
    except InputError as error:
        if speaks and error.errors:
            print(error, file=sys.stderr)
        return error.exit_code
