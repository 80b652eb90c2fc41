"""The keys of the configs for readers and editors: docs/configuration.md and JSON Schema, both from `config`."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from typing import Any

from lcm_ds import deepspeed_config
from lcm_ds.config import PrepareConfig, Schema, TrainConfig
from lcm_ds.model.sizes import PRESETS, ModelSizes, count_parameters
from lcm_ds.train.memory import GIB, States, activations

SCHEMAS: dict[str, type[Schema]] = {"prepare": PrepareConfig, "train": TrainConfig}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_SIZES = {"embed_dim": "concept", "hidden_size": "width", "num_hidden_layers": "layers",
          "num_attention_heads": "heads", "intermediate_size": "feed-forward"}  # fmt: skip
_HEAD = ("| key | type | default | what it is |", "| --- | --- | --- | --- |")
_ROW = 1024  # concepts, for the memory of activations
_DEEPSPEED = "ds_configs/zero1_bf16.json"
_INTRODUCTION = """\
Every key of the YAML files; this page is what `lcm-ds configs --reference` prints. `lcm-ds configs` lists the files
that come with lcm-ds. Any key can be set on the command line as well: `lcm-ds train CONFIG optim.lr=1e-4`. `null`
unsets a key, and – is no value. An unknown key is refused, with the nearest known one.

An editor completes and checks these files by their JSON Schema, if its YAML extension has a language server: save what
`lcm-ds configs --schema train` (or `prepare`) prints as train.schema.json, and begin the YAML with the line
`# yaml-language-server: $schema=train.schema.json`."""
_ABOUT_PRESETS = f"""\
`model.preset` names these sizes, and the other keys of `model` replace them. States are weights, gradients and AdamW's
states on one GPU under `{_DEEPSPEED}`; each row of {_ROW:,} concepts in a micro-batch adds its activations
([deepspeed.md](deepspeed.md#memory)). `lcm-ds train CONFIG --dry-run` has them for any config and number of GPUs."""


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of the YAML files that a command reads.

    Args:
        name: A key of SCHEMAS.

    Returns:
        The schema of the file as a user writes it, so that a single path may stand for a list.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SCHEMAS[name].model_json_schema()}


def page() -> str:
    """docs/configuration.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Configuration"
    yield ""
    yield _INTRODUCTION
    for name, config in SCHEMAS.items():
        schema = config.model_json_schema()
        fields = _inlined(schema, schema["$defs"])["properties"]
        blocks = {key: block for key, field in fields.items() if (block := _block(field)) is not None}
        yield from ["", f"## lcm-ds {'prepare' if name == 'prepare' else 'train and launch'}", "", *_HEAD]
        for key, field in fields.items():
            if key in blocks:
                yield f"| [`{key}`](#{name}-{key}) | block | | {_sentence(field)} |"
            else:
                yield from _rows({key: field}, schema["required"], "")
        for key, block in blocks.items():
            yield from ["", f"### {name}: {key}", "", *block["about"].splitlines(), "", *_HEAD]
            yield from _rows(block["properties"], block.get("required", ()), f"{key}.")
    yield from ["", "## Presets", "", *_presets()]


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    """A JSON Schema with the blocks that it refers to, whose docstrings become `about`."""
    if isinstance(value, list):
        return [_inlined(each, definitions) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        block = definitions[value["$ref"].rpartition("/")[2]]
        value = {**block, "about": block["description"], **value}
    return {key: _inlined(inner, definitions) for key, inner in value.items() if key not in ("$ref", "$defs")}


def _rows(fields: dict[str, Any], required: Container[str], above: str) -> Iterator[str]:
    """A row for each key, with the keys of blocks inside."""
    for name, field in fields.items():
        if (block := _block(field)) is None:
            default = "required" if name in required else _value(field.get("default"))
            yield f"| `{above}{name}` | {_type(field)} | {default} | {_sentence(field)} |"
        for inside, each in (
            ("", block),
            ("[]", _block(field, "items")),
            (".COLUMN", _block(field, "additionalProperties")),
        ):
            if each is not None:
                yield from _rows(each["properties"], each.get("required", ()), f"{above}{name}{inside}.")


def _block(field: dict[str, Any], inside: str = "") -> dict[str, Any] | None:
    """The block that a key holds, or that each of its items is."""
    for choice in field.get("anyOf", [field]):
        choices = choice.get(inside) if inside else choice
        for each in choices.get("anyOf", [choices]) if isinstance(choices, dict) else ():
            if "properties" in each:
                return each
    return None


def _type(field: dict[str, Any]) -> str:
    """The type of a value in words."""
    if "anyOf" in field:
        kinds = dict.fromkeys(_type(each) for each in field["anyOf"] if each != {"type": "null"})
        return " or ".join(sorted(kinds, key=lambda kind: kind.startswith("list")))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        if "prefixItems" in field:
            return f"{len(field['prefixItems'])} × {_type(field['prefixItems'][0])}"
        return f"list of {_type(field['items'])}"
    word = {"string": "text", "boolean": "true or false", "object": "mapping"}.get(field["type"], field["type"])
    bounds = [f"{sign} {_value(field[key]).strip('`')}" for key, sign in _BOUNDS.items() if key in field]
    return f"{word} {', '.join(bounds)}".strip()


def _value(value: Any) -> str:
    """A default, or a bound."""
    if value is None or value in ({}, []):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"`{json.dumps(value)}`"
    if isinstance(value, int):
        return f"`{value}`" if value < 2**32 else f"`2^{value.bit_length() - 1}`"
    return f"`{value:g}`"


def _sentence(field: dict[str, Any]) -> str:
    """The description of a key."""
    return " ".join(field["description"].split()).replace("|", "\\|").removesuffix(".")


def _presets() -> Iterator[str]:
    yield _ABOUT_PRESETS
    yield ""
    yield f"| preset | {' | '.join(_SIZES.values())} | parameters | states | a row |"
    yield "| --- |" + " ---: |" * (len(_SIZES) + 3)
    ds = deepspeed_config.read(_DEEPSPEED) | {"gradient_accumulation_steps": 2}
    for name, values in PRESETS.items():
        sizes = ModelSizes(**values)
        parameters = count_parameters(sizes)
        states = States.of(parameters, 1, 1, ds).peak(0)
        row = activations(sizes, _ROW, half=True)
        numbers = [*(f"{getattr(sizes, key):,}" for key in _SIZES), f"{parameters:,}"]
        yield f"| {name} | {' | '.join(numbers)} | {states / GIB:.3g} GiB | {row / GIB:.3g} GiB |"
