"""Delphi's explanations and scores: one text file a latent, holding JSON.

    explanations/<module>_latent<i>.txt        the explanation, a JSON string
    scores/<scorer>/<module>_latent<i>.txt     a JSON list with one object a scored text

Fields that a version of Delphi has and this module does not know are kept and written back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.json_file import ForeignRecord, read_json, validate, write_json

__all__ = [
    "DelphiScore",
    "explained_latents",
    "read_explanation",
    "read_scores",
    "write_explanation",
    "write_scores",
]

_NAME = re.compile(r"(?P<module>.+)_latent(?P<latent>\d+)\.txt")


class DelphiScore(ForeignRecord):
    """One text that a scorer was asked about.

    Attributes:
        str_tokens, activations: the text, and the latent's activation at each token.
        distance: which quantile an activating text is from; -1 for the others.
        activating: whether the latent fires in it; `prediction` is what the judge said (None: no answer).
        probability: the judge's probability of "yes", where it was asked for.
        correct: whether the prediction is right.
    """

    str_tokens: tuple[str, ...] | None = None
    activations: tuple[float, ...] | None = None
    distance: float | int | str | None = None
    activating: bool | None = None
    prediction: bool | int | None = None
    probability: float | None = None
    correct: bool | None = None


def write_explanation(folder: Path | str, module: str, latent: int, explanation: str) -> Path:
    """Write a latent's explanation in a run's folder, and say where."""
    path = _path(Path(folder) / "explanations", module, latent)
    write_json(path, explanation)
    return path


def read_explanation(folder: Path | str, module: str, latent: int) -> str:
    """Read a latent's explanation. Raises RequestError when there is none."""
    path = _path(Path(folder) / "explanations", module, latent)
    value = read_json(path)
    if not isinstance(value, str):
        raise RequestError(f"{path} holds a JSON {type(value).__name__}; expected a string, the explanation")
    return value


def write_scores(
    folder: Path | str, scorer: str, module: str, latent: int, scores: Sequence[DelphiScore]
) -> Path:
    """Write what a scorer ("detection", "fuzz") found for a latent, and say where."""
    path = _path(Path(folder) / "scores" / scorer, module, latent)
    write_json(path, [score.as_json() for score in scores])
    return path


def read_scores(folder: Path | str, scorer: str, module: str, latent: int) -> tuple[DelphiScore, ...]:
    """Read what a scorer found for a latent. Raises RequestError, naming entry and field, when it is wrong."""
    path = _path(Path(folder) / "scores" / scorer, module, latent)
    value: Any = read_json(path)
    if not isinstance(value, list):
        raise RequestError(f"{path} holds a JSON {type(value).__name__}; expected a list of scored texts")
    scores = []
    for number, entry in enumerate(value):
        score = validate(DelphiScore, entry, f"{path}, entry {number}")
        tokens, activations = score.str_tokens, score.activations
        if tokens is not None and activations is not None and len(tokens) != len(activations):
            raise RequestError(
                f"{path}, entry {number}: activations holds {len(activations)} values for {len(tokens)} str_tokens"
            )
        scores.append(score)
    return tuple(scores)


def explained_latents(folder: Path | str) -> Iterator[tuple[str, int]]:
    """The (module, latent) of every explanation in a run's folder, sorted."""
    names = (_NAME.fullmatch(path.name) for path in (Path(folder) / "explanations").glob("*.txt"))
    return iter(sorted((name["module"], int(name["latent"])) for name in names if name))


def _path(folder: Path, module: str, latent: int) -> Path:
    if latent < 0 or not module or "/" in module:
        raise RequestError(
            f"{module!r} and {latent} name no latent; expected something like 'layers.5' and 17"
        )
    return folder / f"{module}_latent{latent}.txt"
