"""The encoder and splitter behind a model's concepts: concepts.json of an exported model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from lcm_ds.config import DataConfig, Schema, validate
from lcm_ds.data.format import DatasetInfo, EndOfText
from lcm_ds.files import read_object

CONCEPTS = "concepts.json"
_SPACE = ("name", "model", "revision")  # of an encoder: concepts that agree in them are in one space


def same_space(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the concepts of two encoders, blocks `encoder` of dataset.json, can be mixed and compared.

    SONAR has one space for all its languages, and another dtype only rounds differently.
    """
    return one == other or ("name" in one and all(one.get(key) == other.get(key) for key in _SPACE))


def encoder_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs between two encoders of the same space, for messages; empty if nothing does."""
    one, other = ({"backend": "torch", **each} for each in (one, other))
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    return ", ".join(f"{key} {one.get(key)} and {other.get(key)}" for key in keys)


class ConceptInfo(Schema):
    """concepts.json of an exported folder."""

    encoder: dict[str, Any]  # as in dataset.json
    splitter: dict[str, Any] = Field(default_factory=dict)
    language: str | None = None
    end_of_text: EndOfText | None = None
    source_suffix: str | None = None  # the sentence that a fine-tuned model was shown between source and target
    max_segment: int = DataConfig.model_fields["max_segment"].default  # no segment that it was trained on is longer

    @classmethod
    def read(cls, folder: Path) -> ConceptInfo | None:
        """concepts.json of a model's folder, None if there is none. Raises InputError."""
        path = folder / CONCEPTS
        if not path.is_file():
            return None
        fields = read_object(path)  # keys of a later version are ignored
        return validate(cls, {key: fields[key] for key in cls.model_fields if key in fields}, path)

    @classmethod
    def of(cls, info: DatasetInfo, max_segment: int | None = None, mixed: Iterable[DatasetInfo] = ()) -> ConceptInfo:
        """From dataset.json; mixed: other datasets of the same run, of which one may be supervised."""
        more = {} if max_segment is None else {"max_segment": max_segment}
        supervised = next((each.supervised for each in (info, *mixed) if each.supervised is not None), None)
        return cls(
            encoder=info.encoder,
            splitter=info.splitter,
            language=info.language,
            end_of_text=info.end_of_text,
            source_suffix=None if supervised is None else supervised.source_suffix,
            **more,
        )
