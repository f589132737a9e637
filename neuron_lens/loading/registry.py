"""Which families there are: the definition files of `model_defs/`, and the one that covers a checkpoint."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from neuron_lens.errors import CheckpointError, did_you_mean
from neuron_lens.files.model_defs import model_defs_dir, shipped_checkpoints
from neuron_lens.loading.definitions import Definition, read_definition

__all__ = ["KnownModel", "definition_for", "definitions", "known_models"]

_COMMON = "ignored.toml"


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A family that can be loaded, for lists."""

    title: str
    definition: str
    architectures: tuple[str, ...]
    examples: tuple[str, ...]
    shipped: tuple[str, ...]  # checkpoints of the family that come with the library


def definitions(folder: Path | None = None) -> tuple[Definition, ...]:
    """All definitions of a folder (None: the library's own), by title. Raises ConfigError when one is wrong."""
    return _definitions(model_defs_dir() if folder is None else folder)


@cache
def _definitions(folder: Path) -> tuple[Definition, ...]:
    common = folder / _COMMON
    ignored = tuple(tomllib.loads(common.read_text(encoding="utf-8"))["ignored"]) if common.is_file() else ()
    files = sorted(path for path in folder.glob("*.toml") if path.name != _COMMON)
    return tuple(
        sorted((read_definition(f, common_ignored=ignored) for f in files), key=lambda d: d.title.lower())
    )


# Parts of the names of config fields that only models of images have.
IMAGE_WORDS = ("vision", "image", "vq_config")


def definition_for(raw: Mapping[str, Any], source: str) -> Definition:
    """The definition that covers a config.json.

    Raises CheckpointError when its architecture is unknown or multimodal, or known only with other settings.
    """
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(
            f'{source} names no architecture: expected a list such as "architectures": ["GPT2LMHeadModel"]'
        )
    named = [d for d in definitions() if set(d.architectures) & set(map(str, architectures))]
    if not named:
        images = [key for key in raw if any(word in key for word in IMAGE_WORDS)]
        if images:
            raise CheckpointError(
                f"{source}: {', '.join(map(str, architectures))} is multimodal (its config has {images[0]}), and models here "
                f"read text only; give a checkpoint of its language model alone"
            )
        known = [name for d in definitions() for name in d.architectures]
        raise CheckpointError(
            f"{source}: the architecture {', '.join(map(str, architectures))} is unknown "
            f"({did_you_mean(str(architectures[0]), known)}; `neuron-lens models` lists all). If its parts exist in "
            f"TransformerConfig, it takes one new file in {model_defs_dir()}, and no code"
        )
    fitting = [d for d in named if all(raw.get(field, False) == value for field, value in d.when.items())]
    if len(fitting) != 1:
        conditions = "; ".join(f"{d.path.name} when {d.when}" for d in named)
        raise CheckpointError(
            f"{source}: {len(fitting)} definitions of {architectures[0]} fit its settings ({conditions})"
        )
    return fitting[0]


def known_models() -> list[KnownModel]:
    """The families that can be loaded, by title."""
    shipped = {
        name: _architectures(model_defs_dir() / name / "config.json") for name in shipped_checkpoints()
    }
    return [
        KnownModel(
            title=d.title,
            definition=d.name,
            architectures=d.architectures,
            examples=d.examples,
            shipped=tuple(name for name, found in shipped.items() if set(found) & set(d.architectures)),
        )
        for d in definitions()
    ]


def _architectures(config: Path) -> list[str]:
    import json

    return list(json.loads(config.read_text(encoding="utf-8")).get("architectures", ()))
