"""`lcm-ds generate`: prints what was generated; reports all errors of a call before any work."""

import json
import os
import re
import subprocess
import sys

import pytest
from machine import patience

from lcm_ds.errors import InputError
from lcm_ds.generate.command import run

PROMPT = "Rain falls on the hills.  The river rises in the night."


def lcm_ds_generate(*arguments, said=""):
    command = [sys.executable, "-m", "lcm_ds.cli", "generate", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        command, input=said, capture_output=True, encoding="utf-8", env=environment, timeout=patience(120)
    )


@pytest.fixture(scope="module")
def interactive(run_folder, tmp_path_factory):
    """The command, run on a prompt file and then on lines of its standard input: (the process, the file's path)."""
    file = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    file.write_text("Bread needs flour.\nKnead the dough.\n")
    lines = f"{PROMPT}\n\n\u200b\nA tuple\x00\x1b[2Jcannot be changed.\n"
    return lcm_ds_generate(run_folder, "--prompt-file", file, "--interactive", "--max-concepts", 2, said=lines)


def test_prompts_are_read_until_there_are_no_more_and_a_bad_one_ends_nothing(interactive):
    assert interactive.returncode == 0, interactive.stderr
    assert interactive.stderr == "prompt 1, '\\u200b': no sentence found\n"
    assert re.findall(r"^prompt: (\d) sentences?$", interactive.stdout, re.MULTILINE) == ["2", "2", "1"]
    assert len(re.findall("^stopped: ", interactive.stdout, re.MULTILINE)) == 3


def test_it_prints_the_whole_way_and_nothing_that_a_terminal_obeys(interactive, run_folder):
    lines = interactive.stdout.splitlines()
    assert lines[:4] == [
        f"{run_folder}: step 5",
        "prompt: 2 sentences",
        "      Bread needs flour.",
        "      Knead the dough.",
    ]
    answers = [line for line in lines if re.match(r" +\d  ", line)]
    assert len(answers) >= 3
    assert all(re.fullmatch(r" +\d  retrieved +-?\d\.\d{3} .+", line) for line in answers)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", interactive.stdout)


def test_prompts_are_numbered_and_written_as_json(exported, tmp_path, capsys):
    out = tmp_path / "out.json"
    folder = exported("sonar", source_suffix="[MODEL]:", max_segment=4)
    run(str(folder), prompts=["One. Two. Three.", "Four."], max_concepts=3, stop_repeat="off", stop_end="0.95",
        language="fra_Latn", device="cpu", json_path=str(out))  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder)
    assert lines[1] == "prompt 1: the last 2 of 3 sentences (the model was trained on 4 at a time)"
    suffix = [number for number, line in enumerate(lines) if line.startswith("      [MODEL]:  (follows every prompt")]
    assert len(suffix) == 2
    assert "from here on the text is longer than the 4 concepts that the model was trained on" in lines
    assert "prompt 2: 1 sentence" in lines
    assert lines[-1] == "stopped: max_concepts was reached (3)"
    written = json.loads(out.read_text())
    settings = {
        "model": str(folder), "step": None, "max_concepts": 3, "stop_end": 0.95, "stop_repeat": None,
        "language": "fra_Latn", "beams": 5, "source_suffix": "[MODEL]:",
    }  # fmt: skip
    assert {key: value for key, value in written.items() if key != "texts"} == settings
    assert [text["prompt"] for text in written["texts"]] == [["Two.", "Three."], ["Four."]]
    decoded = [line.split("decoded", 1)[1].strip() for line in lines if "decoded" in line]
    assert decoded == [sentence.strip() for text in written["texts"] for sentence in text["sentences"]]
    assert all(text["cosines"] is None for text in written["texts"])


def test_the_reason_names_the_threshold_that_was_used(exported, capsys):
    folder = exported("minilm", constant=True)
    dataset = exported.datasets["minilm"].path
    run(str(folder), prompts=[PROMPT], stop_end="off", stop_repeat="0.75", device="cpu", dataset=dataset)
    said = "stopped: the last concept repeats the one before (cosine above 0.75)"
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_a_missing_end_of_text_concept_is_reported(exported, capsys):
    folder = exported("sonar", end_of_text=None)
    run(str(folder), prompts=[PROMPT], max_concepts=1, device="cpu")
    assert f"{folder}/concepts.json has no end-of-text concept: --stop-end has no effect" in capsys.readouterr().out


def test_errors_of_the_call_come_together_without_a_traceback(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    done = lcm_ds_generate(
        tmp_path / "none", "--prompt", " \n", "--prompt", "fine.",
        "--prompt-file", tmp_path / "binary", "--prompt-file", tmp_path / "gone",
        "--max-concepts", 0, "--beams", 0, "--stop-end", 2, "--stop-repeat", "never",
        "--json", tmp_path / "no" / "file",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    expected = (
        "binary: cannot be read as UTF-8 text", "gone: cannot be read", "--prompt 1: is empty", "--max-concepts: ",
        "--beams: ", "--stop-end: has to be a cosine from -1 to 1, or off, not '2'", "--stop-repeat: ", "--json: ",
        "none: no run here",
    )  # fmt: skip
    for line, part in zip(done.stderr.splitlines(), expected, strict=True):
        assert part in line


def test_a_call_needs_a_prompt_and_json_is_not_for_conversations(run_folder):
    with pytest.raises(InputError, match="needs a --prompt, a --prompt-file, or --interactive"):
        run(str(run_folder))
    with pytest.raises(InputError, match="--json: cannot be used with --interactive"):
        run(str(run_folder), interactive=True, json_path="out.json")


def test_the_help_fits_a_screen_and_gives_an_example():
    done = lcm_ds_generate("--help")
    assert len(done.stdout.splitlines()) < 40
    assert "example: lcm-ds generate" in done.stdout
