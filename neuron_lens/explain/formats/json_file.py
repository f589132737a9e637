"""JSON and JSON-lines files as values, with errors that name the file, the line and the field.

Local and remote files, plain and gzipped. Numbers that JSON cannot hold: NaN is read as null (older files of
several tools contain it), an infinity is refused.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from neuron_lens.errors import RequestError
from neuron_lens.files.atomic import write_bytes_atomic
from neuron_lens.files.remote import local_copy

__all__ = [
    "ForeignRecord",
    "parse_json",
    "read_json",
    "read_json_lines",
    "validate",
    "write_json",
    "write_json_lines",
]

AnyModel = TypeVar("AnyModel", bound=BaseModel)

_IN_NUMBER = re.compile(r"-|\.|[eE][+-]?")  # what is left of a number that is cut off where it may not end


class ForeignRecord(BaseModel):
    """Base of records that other tools keep extending: a field we do not know is kept and written back."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    def as_json(self) -> dict[str, Any]:
        """The fields that were given, as JSON values: what was left out stays out."""
        return self.model_dump(mode="json", exclude_unset=True)


def read_json(path: Path | str) -> Any:
    """The one JSON value in a file. Raises RequestError when there is none, or it is cut off."""
    return parse_json(_read_text(path), str(path))


def read_json_lines(path: Path | str) -> Iterator[tuple[str, Any]]:
    """Every line's JSON value, with its place ("<file>, line 3") for messages; empty lines are skipped.

    Raises RequestError when the file is missing or cut off, or a line is not JSON.
    """
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse_json(line, place)


def write_json(path: Path | str, value: Any) -> None:
    """Write one JSON value, atomically; gzipped where the name ends in .gz."""
    _write_text(path, _dumps(value) + "\n")


def write_json_lines(path: Path | str, values: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically; gzipped where the name ends in .gz."""
    _write_text(path, "".join(_dumps(value) + "\n" for value in values))


def parse_json(text: str | bytes, place: str) -> Any:
    """The JSON value in a text. Raises RequestError, naming the place, when it is none."""

    def constant(name: str) -> None:
        if name != "NaN":
            raise RequestError(f"{place} holds {name}, which is not a finite number; write it anew")

    try:
        return json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        cut = " (it ends early: the file is cut off)" if _is_cut_off(error) else ""
        where = (
            f"character {error.colno}" if "line" in place else f"line {error.lineno}, character {error.colno}"
        )
        raise RequestError(
            f"{place} is not JSON at {where}: {error.msg}{cut}; fetch or write it again"
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{place} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def validate(kind: type[AnyModel], value: Any, place: str) -> AnyModel:
    """`value` as a record of that kind. Raises RequestError, naming place and field, when it does not fit."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        field = ".".join(str(part) for part in errors[0]["loc"]) or "the whole of it"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        message = errors[0]["msg"].removeprefix("Value error, ")
        raise RequestError(f"{place} is not a {kind.__name__}: {field}: {message}{more}") from None


def _is_cut_off(error: json.JSONDecodeError) -> bool:
    """Whether what the parser stumbled over is the end of the text, in the middle of a value."""
    rest = error.doc[error.pos :].strip()
    in_literal = any(literal.startswith(rest) for literal in ("true", "false", "null", "NaN"))
    in_escape = error.msg.startswith("Invalid \\u") and len(rest) < len("\\u0000")
    in_string = in_escape or error.msg.startswith("Unterminated string")
    return in_literal or in_string or _IN_NUMBER.fullmatch(rest) is not None


def _read_text(path: Path | str) -> str:
    local = local_copy(path)
    try:
        data = local.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8")
    except FileNotFoundError:
        raise RequestError(f"there is no file {path}; check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"{path} is cut off or not gzip ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error


def _write_text(path: Path | str, text: str) -> None:
    data = text.encode("utf-8", errors="surrogatepass")
    # no time in the header: the same content is the same bytes
    write_bytes_atomic(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
