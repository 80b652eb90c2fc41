"""docs/configuration.md and the JSON Schema of the configs say what the schema in lcm_ds/config.py says."""

import json
import re

import pytest
import yaml
from docs import REPOSITORY
from jsonschema import Draft202012Validator

from lcm_ds import cli, reference
from lcm_ds.config import Schema

CONFIGS = sorted(path for name in reference.SCHEMAS for path in (REPOSITORY / "configs" / name).glob("*.yaml"))


def errors(name, mapping):
    return [f"{error.json_path}: {error.message}" for error in
            Draft202012Validator(reference.json_schema(name)).iter_errors(mapping)]  # fmt: skip


def fields(block, above=""):
    """(dotted key, description) of every key."""
    for name, field in block.model_fields.items():
        yield above + name, field.description
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for choice in (each for each in inner if isinstance(each, type) and issubclass(each, Schema)):
            yield from fields(choice, f"{above}{name}.")


def test_the_page_is_what_the_command_prints(capsys):
    assert cli.main(["configs", "--reference"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", reference.SCHEMAS)
def test_every_key_has_a_sentence_and_a_row(name):
    keys = dict(fields(reference.SCHEMAS[name]))
    assert len(keys) > 40
    assert [key for key, description in keys.items() if not description or not description.endswith((".", "…"))] == []
    page = reference.page()
    section = page[page.index(f"## lcm-ds {name}") :].replace("[]", "").replace(".COLUMN", "")
    rows = {*re.findall(r"^\| \[?`([\w.]+)`", section, re.MULTILINE)}
    inner = {key.rpartition(".")[0] for key in keys if key.count(".") > 1}  # their keys have rows instead
    assert {*keys} - inner <= rows


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_shipped_configs_follow_their_json_schema(path):
    assert errors(path.parent.name, yaml.safe_load(path.read_text(encoding="utf-8"))) == []


def test_an_editor_marks_what_lcm_ds_refuses_and_takes_what_it_takes():
    mapping = yaml.safe_load((REPOSITORY / "configs/train/quickstart.yaml").read_text(encoding="utf-8"))
    assert errors("train", mapping | {"data": {"train": ["a", {"path": "b", "weight": 3}]}, "deepspeed": {}}) == []
    wrong = errors("train", mapping | {"stepz": 3, "seed": -1, "optim": {}, "data": {"train": [1]}})
    assert len(wrong) == 4, wrong
    assert {error.partition(":")[0] for error in wrong} == {"$", "$.seed", "$.optim", "$.data.train"}


def test_the_schema_is_printed_as_json_alone(capsys):
    assert cli.main(["configs", "--schema", "prepare"]) == 0
    assert json.loads(capsys.readouterr().out) == reference.json_schema("prepare")
    assert cli.main(["configs", "--schema", "train", "--reference"]) == 2
    assert capsys.readouterr().err == "configs: give --reference or --schema alone\n"
