"""Interventions on disk: a JSON file that says what is done, and a safetensors file beside it with the tensors.

Tensors are named by their content, so that one source shared by many interventions is stored once. Loading parses
data and runs no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from neuron_lens.errors import RequestError
from neuron_lens.files.atomic import atomic_path, write_json_atomic
from neuron_lens.interventions.attention_knockout import AttentionKnockout
from neuron_lens.interventions.declared import Intervention
from neuron_lens.interventions.kinds import (
    Add,
    AddRecorded,
    Clamp,
    Freeze,
    MeanAblate,
    ProjectOut,
    ResampleAblate,
    Scale,
    Set,
    Zero,
)
from neuron_lens.interventions.latents import EditLatents
from neuron_lens.interventions.patch import Patch
from neuron_lens.interventions.places import validation_text
from neuron_lens.interventions.tensors import Activations, TensorData, tensor_digest

__all__ = [
    "AnyIntervention",
    "load_interventions",
    "load_tensors",
    "save_interventions",
    "save_tensors",
    "tensors_of",
]

FORMAT = 1

AnyIntervention = Annotated[
    Zero
    | Set
    | Scale
    | Add
    | AddRecorded
    | Clamp
    | ProjectOut
    | Patch
    | MeanAblate
    | ResampleAblate
    | Freeze
    | AttentionKnockout
    | EditLatents,
    Field(discriminator="kind"),
]
_LIST: TypeAdapter[list[Any]] = TypeAdapter(list[AnyIntervention])


def save_interventions(
    interventions: Intervention | Iterable[Intervention], path: str | os.PathLike[str]
) -> None:
    """Write interventions to `path` (JSON) and their tensors beside it (`.safetensors`), each file atomically.

    Raises RequestError when a place cannot be written to.
    """
    listed = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    save_tensors(path, tensors_of(listed))
    write_json_atomic(
        path, {"format": FORMAT, "interventions": [one.model_dump(mode="json") for one in listed]}
    )


def load_interventions(path: str | os.PathLike[str]) -> list[Intervention]:
    """The interventions `save_interventions` wrote.

    Raises RequestError when a file is missing, damaged, or holds something else.
    """
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or "interventions" not in stored:
        raise RequestError(f"{path} does not hold interventions of format {FORMAT}")
    return parse_interventions(stored["interventions"], load_tensors(path), str(path))


def parse_interventions(stored: Any, tensors: dict[str, TensorData], where: str) -> list[Intervention]:
    """Interventions from their JSON form."""
    try:
        return _LIST.validate_python(_with_tensors(stored, tensors, where))
    except ValidationError as error:
        raise RequestError(f"{where}: {validation_text(error)}") from None


def _with_tensors(stored: Any, tensors: dict[str, TensorData], where: str) -> Any:
    """The JSON form with digests replaced by the tensors they stand for."""

    def tensor(digest: Any) -> TensorData:
        if digest not in tensors:
            raise RequestError(
                f"{where}: the tensor {digest!s:.12}… is not in {tensor_file(where).name} beside it"
            )
        return tensors[digest]

    if isinstance(stored, list):
        return [_with_tensors(value, tensors, where) for value in stored]
    if not isinstance(stored, dict):
        return stored
    if set(stored) == {"tensor"}:
        return tensor(stored["tensor"])
    if set(stored) == {"activations"}:
        try:
            return Activations(
                {(site, layer): tensor(digest) for site, layer, digest in stored["activations"]}
            )
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"{where}: {stored['activations']!r:.80} is not a list of activations ({error})"
            ) from None
    return {key: _with_tensors(value, tensors, where) for key, value in stored.items()}


def tensors_of(interventions: Sequence[Intervention]) -> dict[str, TensorData]:
    """All tensors that interventions hold, by digest."""
    found: dict[str, TensorData] = {}
    for intervention in interventions:
        for name in type(intervention).model_fields:
            value = getattr(intervention, name)
            held = [value] if isinstance(value, TensorData) else []
            if isinstance(value, Activations):
                held = [value.entry(place) for place in value]
            found.update((data.digest, data) for data in held)
    return found


def tensor_file(path: str | os.PathLike[str]) -> Path:
    """The safetensors file that stands beside a JSON file."""
    return Path(path).with_suffix(".safetensors")


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, TensorData]) -> None:
    """Write tensors beside the JSON file `path`; no file when there are none."""
    target = tensor_file(path)
    if not tensors:
        target.unlink(missing_ok=True)
        return
    with atomic_path(target) as temporary:
        # clones: safetensors refuses views of one storage
        save_file({name: data.tensor.cpu().clone().contiguous() for name, data in tensors.items()}, temporary)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, TensorData]:
    """The tensors beside a JSON file, each checked against its digest."""
    source = tensor_file(path)
    if not source.exists():
        return {}
    try:
        loaded = load_file(source)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{source} cannot be read as safetensors: {error}") from None
    damaged = [name for name, tensor in loaded.items() if tensor_digest(tensor) != name]
    if damaged:
        raise RequestError(
            f"{source}: the content of {len(damaged)} tensors does not match their digests; write it anew"
        )
    return {name: TensorData(tensor) for name, tensor in loaded.items()}


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parsed JSON of a file. Raises RequestError when it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}") from None
