"""The command line as a whole: what its help says, and what it makes of calls that mean nothing."""

import re
import shlex

import pytest

from lcm_ds.cli import build_parser, main

VERBS = sorted(build_parser().get_default("commands"))
SCREEN = 45  # lines


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_fits_a_screen_and_its_example_is_a_call_that_it_takes(verb, capsys):
    lines = help_of(capsys, verb)
    assert len(lines) <= SCREEN
    examples = [match[1] for line in lines if (match := re.match(rf"(?:example: |\s+)?(lcm-ds {verb}\b.*)", line))]
    assert examples
    for example in examples:
        parsed = build_parser().parse_args(shlex.split(example)[1:])  # ends with 2 where it is none
        assert callable(parsed.verb)


def test_help_of_the_whole_fits_a_screen_names_all_verbs_and_its_examples_are_calls(capsys):
    lines = help_of(capsys)
    assert len(lines) <= SCREEN
    named = [match[1] for line in lines if (match := re.match(r"    ([a-z][a-z-]*)(?:  |$)", line))]
    assert sorted(named) == VERBS
    examples = [line for line in lines if line.startswith("  lcm-ds ")]
    assert len(examples) == 3
    for example in examples:
        build_parser().parse_args(shlex.split(example)[1:])


def test_no_verb_gives_the_help_and_2(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: lcm-ds" in err
    assert "examples:" in err


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (["trian", "configs/train/quickstart.yaml"], "lcm-ds: trian: there is no such verb; did you mean 'train'?\n"),
        (["xyzzy"], "lcm-ds: xyzzy: there is no such verb; `lcm-ds --help` lists the verbs\n"),
        (["export", "a", "b", "--stpe"], "lcm-ds export: --stpe: there is no such option; did you mean '--step'?\n"),
        (
            ["launch", "--local", "2", "--dry-run", "c.yaml"],
            "lcm-ds launch: --dry-run: there is no such option; `lcm-ds launch --help` lists them\n",
        ),
    ],
)
def test_a_verb_or_an_option_that_is_none_is_refused_with_the_nearest(call, told, capsys):
    assert main(call) == 2
    assert capsys.readouterr().err == told


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"lcm-ds \d+\.\d+\.\d+\n", capsys.readouterr().out)
