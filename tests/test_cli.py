"""The command line: its help, and how it refuses calls that it does not understand."""

import re
import shlex

import pytest

from lcm_ds.cli import build_parser, main

COMMANDS = sorted(build_parser().get_default("commands"))
SCREEN = 45  # lines


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_verb_fits_a_screen_and_its_example_is_a_call_that_it_takes(command, capsys):
    lines = help_of(capsys, command)
    assert len(lines) <= SCREEN
    examples = [match[1] for line in lines if (match := re.match(rf"(?:example: |\s+)?(lcm-ds {command}\b.*)", line))]
    assert examples
    for example in examples:
        parsed = build_parser().parse_args(shlex.split(example)[1:])  # exits with 2 if it is invalid
        assert callable(parsed.command)


def test_main_help_fits_a_screen_lists_all_commands_and_its_examples_are_valid(capsys):
    lines = help_of(capsys)
    assert len(lines) <= SCREEN
    named = [match[1] for line in lines if (match := re.match(r"    ([a-z][a-z-]*)(?:  |$)", line))]
    assert sorted(named) == COMMANDS
    examples = [line for line in lines if line.startswith("  lcm-ds ")]
    assert len(examples) == 3
    for example in examples:
        build_parser().parse_args(shlex.split(example)[1:])


def test_without_a_command_the_help_is_printed_and_the_exit_code_is_2(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: lcm-ds" in err
    assert "examples:" in err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["trian", "configs/train/quickstart.yaml"], "lcm-ds: unknown command 'trian'; did you mean 'train'?\n"),
        (["xyzzy"], "lcm-ds: unknown command 'xyzzy'; `lcm-ds --help` lists the commands\n"),
        (["export", "a", "b", "--stpe"], "lcm-ds export: unknown option --stpe; did you mean '--step'?\n"),
        (["--stpe", "export", "a", "b"], "lcm-ds export: unknown option --stpe; did you mean '--step'?\n"),
        (
            ["--dry-run", "train", "c.yaml"],
            "lcm-ds: --dry-run: options stand behind the command: lcm-ds COMMAND --dry-run …\n",
        ),
        (["--dry-run"], "lcm-ds: --dry-run: options stand behind the command: lcm-ds COMMAND --dry-run …\n"),
        (
            ["launch", "--local", "2", "--xyzzy", "c.yaml"],
            "lcm-ds launch: unknown option --xyzzy; `lcm-ds launch --help` lists the options\n",
        ),
    ],
)
def test_an_unknown_command_or_option_is_refused_with_the_closest_match(call, message, capsys):
    assert main(call) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("option", ["--local_rank=0", "--local-rank=0"])
def test_a_launchers_option_in_front_of_the_command_is_taken(option, capfd):
    call = ["train", "configs/train/quickstart.yaml", "--dry-run", "steps=x"]
    assert main(call) == 2
    without = capfd.readouterr().err
    assert "steps" in without
    assert main([option, *call]) == 2
    assert capfd.readouterr().err == without


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"lcm-ds \d+\.\d+\.\d+\n", capsys.readouterr().out)
