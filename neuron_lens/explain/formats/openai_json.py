"""The JSON of OpenAI's records: text and files, in every form their tools have written.

Every object carries its class in `dataclass_name`; older files lack it, and some use names that were changed
later. All of these are read. What is written is the one form, in one of two dialects that differ in a single
name: `ScoredSequenceSimulation.simulation` is `sequence_simulation` in the transformer debugger.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.explain.formats.json_file import parse_json, read_json, read_json_lines, validate, write_json
from neuron_lens.explain.formats.openai_records import CLASSES, KINDS, OpenAIRecord

__all__ = ["Dialect", "dumps", "loads", "read_record", "write_record"]

Dialect = Literal["neuron_explainer", "transformer_debugger"]

AnyOpenAI = TypeVar("AnyOpenAI", bound=OpenAIRecord)


def dumps(record: OpenAIRecord, dialect: Dialect = "neuron_explainer") -> str:
    """The record as JSON on one line, in their order of fields, with `dataclass_name` in every object."""
    return json.dumps(_as_json(record, dialect), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def loads(text: str | bytes, kind: type[AnyOpenAI] | None = None, place: str = "the text") -> AnyOpenAI:
    """The record in a JSON text, of the given kind or of the kind it says.

    Without `dataclass_name`, the kind is the one with exactly these fields, or the only one that has them all
    among its own. `place` names the text in messages. Raises RequestError when the text is not JSON, names an
    unknown class, fits none or several, or a field is wrong.
    """
    return _record(parse_json(text, place), kind, place)


def read_record(path: Path | str, kind: type[AnyOpenAI] | None = None) -> AnyOpenAI:
    """Read a local or remote file: `.json` with one record, or `.jsonl` with exactly one line.

    Raises RequestError as `loads` does, and for a `.jsonl` with none or several lines; CheckpointError for a
    remote file that cannot be fetched.
    """
    if not str(path).endswith(".jsonl"):
        return _record(read_json(path), kind, str(path))
    lines = list(read_json_lines(path))
    if len(lines) != 1:
        raise RequestError(f"{path} holds {len(lines)} records; expected exactly one line")
    place, value = lines[0]
    return _record(value, kind, place)


def write_record(path: Path | str, record: OpenAIRecord, dialect: Dialect = "neuron_explainer") -> None:
    """Write a record to a local file, atomically, on one line: what `read_record` reads."""
    write_json(path, _as_json(record, dialect))


def _record(value: Any, kind: type[AnyOpenAI] | None, place: str) -> AnyOpenAI:
    found: Any = kind or _kind_of(value, place)
    record: AnyOpenAI = validate(found, value, place)
    return record


def _kind_of(value: Any, place: str) -> type[OpenAIRecord]:
    if not isinstance(value, dict):
        raise RequestError(f"{place} holds a JSON {type(value).__name__}; expected an object with a record")
    if "dataclass_name" in value:
        name = value["dataclass_name"]
        if str(name) not in CLASSES:
            hint = did_you_mean(str(name), CLASSES)
            raise RequestError(f"{place}: dataclass_name {name!r} is no known class; {hint}")
        return CLASSES[str(name)]
    fields = {kind: {kind.renames.get(key, key) for key in value} - kind.dropped for kind in KINDS}
    exact = [kind for kind in KINDS if fields[kind] == set(kind.model_fields)]
    subset = [kind for kind in KINDS if fields[kind] and fields[kind] <= set(kind.model_fields)]
    for fitting in (exact, subset):
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = ", ".join(kind.__name__ for kind in fitting)
            raise RequestError(
                f"{place} has no dataclass_name and may be any of {names}; say which kind it is"
            )
    raise RequestError(
        f"{place} has no dataclass_name, and no class has the fields {', '.join(value) or '(none)'}"
    )


def _as_json(value: Any, dialect: Dialect) -> Any:
    if isinstance(value, OpenAIRecord):
        names = value.debugger_names if dialect == "transformer_debugger" else {}
        fields = {
            names.get(field, field): _as_json(getattr(value, field), dialect)
            for field in type(value).model_fields
        }
        return {**fields, "dataclass_name": type(value).__name__}
    return [_as_json(item, dialect) for item in value] if isinstance(value, tuple) else value
