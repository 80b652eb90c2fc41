"""Evaluation of a model beside its baselines."""

from __future__ import annotations

import argparse
import os
import sys

from lcm_ds.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lcm-ds evaluate`, which its workers take as well."""
    parser.add_argument("run", metavar="RUN|FOLDER", help="a run, or an exported model")
    parser.add_argument("--dataset", metavar="DATASET", help="default: the run's validation dataset")
    parser.add_argument("--step", type=int, metavar="N", help="step of the run's checkpoint; default: the newest")
    parser.add_argument("--json", metavar="FILE", help="also write the metrics to FILE")
    parser.add_argument("--figure", metavar="FILE.png", help="also plot the error by position to FILE.png")
    parser.add_argument(
        "--decoder", metavar="HUB|FOLDER", help="decoder for ℓ2 round trip and MI; default: the encoder's own"
    )
    parser.add_argument("--causal-lm", metavar="HUB|FOLDER", help="language model for MI; paper: openai-community/gpt2")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="targets to decode; default: 256")
    parser.add_argument(
        "--baseline-concepts", type=int, default=500_000, metavar="N",
        help="concepts of the training data, at most, to fit the ridges to; default: 500000",
    )  # fmt: skip


def worker(arguments: argparse.Namespace) -> list[str]:
    """The command line of one worker process of this evaluation."""
    options = ("dataset", "step", "json", "figure", "decoder", "causal_lm", "samples", "baseline_concepts")
    values = {option: vars(arguments)[option] for option in options}
    words = [[f"--{option.replace('_', '-')}", str(value)] for option, value in values.items() if value is not None]
    return [sys.executable, "-m", "lcm_ds.evaluate", arguments.run, *(word for pair in words for word in pair)]


def main(arguments: argparse.Namespace) -> int:
    """Run one rank of an evaluation, as the launcher's environment variables say; returns the exit code."""
    from lcm_ds.distributed.environment import detect_environment, exit_with_launcher

    exit_with_launcher(os.environ)
    prints_errors = True
    try:
        env = detect_environment(os.environ)
        prints_errors = env.local_rank == 0  # one process per host
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
            baseline_concepts=arguments.baseline_concepts,
            env=env,
        )
        return 0
    except InputError as error:
        if prints_errors and error.errors:
            print(error, file=sys.stderr)
        return error.exit_code
