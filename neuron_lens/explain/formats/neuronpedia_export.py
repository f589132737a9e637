"""Neuronpedia's bulk import: a folder of JSON-lines files for one source (the units of one layer).

    <exports>/<model>/<source_id>/{release,model,sourceset,source}.jsonl   one line each, as Neuronpedia has them
    <exports>/<model>/<source_id>/features/batch-<n>.jsonl.gz              one line a unit
    <exports>/<model>/<source_id>/activations/batch-<n>.jsonl.gz           one line a text
    <exports>/<model>/<source_id>/explanations/batch-<n>.jsonl.gz          one line an explanation

In these rows `layer` is the source's name ("{layer}-{set}[__suffix]"), not a number, and `index` is text.
Plain `.jsonl` files are read too. Fields we do not know are kept; what our results lack is null or empty.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import BeforeValidator, NonNegativeInt, StringConstraints, model_validator

from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.json_file import (
    ForeignRecord,
    read_json_lines,
    validate,
    write_json_lines,
)
from neuron_lens.explain.formats.neuronpedia import DashboardBatch, FeatureTables, Indices, Numbers
from neuron_lens.explain.result import UnitResult

__all__ = [
    "ExportActivation",
    "ExportExplanation",
    "ExportFeature",
    "ExportFolder",
    "export_activations",
    "export_explanation",
    "export_features",
]

MetadataName = Literal["release", "model", "sourceset", "source"]

_BATCH = re.compile(r"batch-(\d+)\.jsonl(\.gz)?")

IndexText = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    StringConstraints(pattern=r"^\d+$"),
]


class ExportRow(ForeignRecord):
    """What all rows share: the model, the source, and the unit's index in it (as text)."""

    modelId: str
    layer: str
    index: IndexText


class ExportActivation(ExportRow):
    """One text with a unit's activations. `dataIndex` and `dataSource` say where the text is from."""

    id: str
    tokens: tuple[str, ...]
    values: Numbers
    maxValue: float
    maxValueTokenIndex: NonNegativeInt
    minValue: float
    creatorId: str | None = None
    createdAt: str | None = None
    dataIndex: str | None = None
    dataSource: str | None = None
    dfaValues: Numbers = ()
    dfaTargetIndex: NonNegativeInt | None = None
    dfaMaxValue: float | None = None
    lossValues: Numbers = ()
    logitContributions: Any = None
    binMin: float | None = None
    binMax: float | None = None
    binContains: float | None = None
    qualifyingTokenIndex: NonNegativeInt | None = None
    zIndices: Any = None
    zValues: Any = None

    @model_validator(mode="after")
    def _one_value_a_token(self) -> Self:
        n = len(self.tokens)
        for name in ("values", "dfaValues", "lossValues"):
            values = getattr(self, name)
            if len(values) != n and (values or name == "values"):
                raise ValueError(f"{name} holds {len(values)} values for {n} tokens")
        for name in ("maxValueTokenIndex", "qualifyingTokenIndex", "dfaTargetIndex"):
            index = getattr(self, name)
            if index is not None and index >= n:
                raise ValueError(f"{name} is {index} for {n} tokens")
        return self


class ExportFeature(FeatureTables, ExportRow):
    """One unit: the tables of its dashboard under their own names, and what is kept beside them."""

    sourceSetName: str | None = None
    creatorId: str | None = None
    createdAt: str | None = None
    maxActApprox: float | None = None
    topkCosSimIndices: Indices = ()
    topkCosSimValues: Numbers = ()
    hasVector: bool = False
    vectorLabel: str | None = None
    vectorDefaultSteerStrength: float | None = None
    hookName: str | None = None


class ExportExplanation(ExportRow):
    """One explanation. `typeName` is the explainer, `embedding` the text's, for search."""

    id: str
    description: str
    typeName: str | None = None
    explanationModelName: str | None = None
    authorId: str | None = None
    embedding: Any = None
    notes: str | None = None
    scoreV1: float | None = None
    scoreV2: float | None = None


AnyRow = TypeVar("AnyRow", bound=ExportRow)


@dataclass(frozen=True)
class ExportFolder:
    """One source's folder in an export: `exports/model/source_id`."""

    exports: Path | str
    model_id: str
    source_id: str

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.exports) / self.model_id / self.source_id

    def write(self, batch: int, rows: Iterable[ExportRow], *, compress: bool = True) -> Path:
        """Write rows of one kind as batch number `batch`, and say where.

        Raises RequestError for no rows, rows of several kinds, or a row of another model or source.
        """
        listed = list(rows)
        kinds = {type(row) for row in listed}
        if len(kinds) != 1 or batch < 0:
            names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no rows"
            raise RequestError(
                f"a batch (number {batch}) holds rows of one kind, and at least one; given: {names}"
            )
        for row in listed:
            if (row.modelId, row.layer) != (self.model_id, self.source_id):
                raise RequestError(
                    f"a row of {row.modelId}, {row.layer} does not belong in {self.path}; expected "
                    f"{self.model_id}, {self.source_id}"
                )
        name = f"batch-{batch}.jsonl{'.gz' if compress else ''}"
        path = self.path / _FOLDERS[kinds.pop()] / name
        write_json_lines(path, (row.as_json() for row in listed))
        return path

    def features(self) -> Iterator[ExportFeature]:
        """The units, batch by batch."""
        return self._rows(ExportFeature)

    def activations(self) -> Iterator[ExportActivation]:
        """The texts, batch by batch."""
        return self._rows(ExportActivation)

    def explanations(self) -> Iterator[ExportExplanation]:
        """The explanations, batch by batch."""
        return self._rows(ExportExplanation)

    def write_metadata(self, name: MetadataName, row: dict[str, Any]) -> None:
        """Write what Neuronpedia is to say of the release, model, source set or source, in its own fields."""
        write_json_lines(self.path / f"{name}.jsonl", [row])

    def metadata(self, name: MetadataName) -> dict[str, Any]:
        """What the export says of the release, model, source set or source."""
        path = self.path / f"{name}.jsonl"
        rows = [value for _, value in read_json_lines(path)]
        if len(rows) != 1 or not isinstance(rows[0], dict):
            raise RequestError(f"{path} holds {len(rows)} lines; expected one, with an object")
        return dict(rows[0])

    def _rows(self, kind: type[AnyRow]) -> Iterator[AnyRow]:
        folder = self.path / _FOLDERS[kind]
        found = [(_BATCH.fullmatch(path.name), path) for path in folder.glob("batch-*.jsonl*")]
        batches = sorted((int(match[1]), path) for match, path in found if match)
        if len({number for number, _ in batches}) < len(batches):
            raise RequestError(f"{folder} holds a batch twice, plain and gzipped; remove one")
        for _, path in batches:
            for place, value in read_json_lines(path):
                yield validate(kind, value, place)


_FOLDERS: dict[type[ExportRow], str] = {
    ExportFeature: "features",
    ExportActivation: "activations",
    ExportExplanation: "explanations",
}


def export_features(
    batch: DashboardBatch, *, creator_id: str | None = None, created_at: str | None = None
) -> tuple[ExportFeature, ...]:
    """A batch's dashboards as rows. `maxActApprox` is the largest activation shown.

    Neuronpedia asks for a creator and a time (ISO 8601) on import: give them, or they are null.
    """
    rows = []
    for feature in batch.features:
        shown = [value for text in feature.activations for value in text.values]
        given: dict[str, Any] = {name: getattr(feature, name) for name in FeatureTables.model_fields}
        row = _whole(
            ExportFeature,
            modelId=batch.model_id,
            layer=batch.source_id,
            index=str(feature.feature_index),
            sourceSetName=batch.sae_set,
            creatorId=creator_id,
            createdAt=created_at,
            maxActApprox=max(shown, default=None),
            hasVector=bool(feature.vector),
            **given,
        )
        rows.append(row)
    return tuple(rows)


def export_activations(
    batch: DashboardBatch, *, creator_id: str | None = None, created_at: str | None = None
) -> tuple[ExportActivation, ...]:
    """A batch's texts as rows. Ids are hashes of the content, so that the same text has the same id again."""
    rows = []
    for feature in batch.features:
        for number, text in enumerate(feature.activations):
            if not text.values:
                continue
            index = str(feature.feature_index)
            place = int(np.argmax(text.values))
            row = _whole(
                ExportActivation,
                id=_id(batch.model_id, batch.source_id, index, str(number), *text.tokens),
                modelId=batch.model_id,
                layer=batch.source_id,
                index=index,
                tokens=text.tokens,
                values=text.values,
                maxValue=text.values[place],
                maxValueTokenIndex=place,
                minValue=min(text.values),
                creatorId=creator_id,
                createdAt=created_at,
                dfaValues=text.dfa_values or (),
                dfaTargetIndex=text.dfa_targetIndex,
                dfaMaxValue=text.dfa_maxValue,
                binMin=text.bin_min,
                binMax=text.bin_max,
                binContains=text.bin_contains,
                qualifyingTokenIndex=text.qualifying_token_index,
            )
            rows.append(row)
    return tuple(rows)


def export_explanation(
    result: UnitResult, batch: DashboardBatch, *, author_id: str | None = None, model: str | None = None
) -> ExportExplanation:
    """A result's explanation as a row of the batch's source; `model` is the judge that wrote it, if one did."""
    index = str(result.unit.index)
    return _whole(
        ExportExplanation,
        id=_id(batch.model_id, batch.source_id, index, result.explanation.sentence),
        modelId=batch.model_id,
        layer=batch.source_id,
        index=index,
        description=result.explanation.sentence,
        typeName=result.explanation.explainer,
        explanationModelName=model,
        authorId=author_id,
    )


def _whole(kind: type[AnyRow], **given: Any) -> AnyRow:
    """A row with every column, since a database's import has no defaults: null or empty where not given."""
    defaults = {name: field.default for name, field in kind.model_fields.items() if not field.is_required()}
    return kind(**(defaults | given))


def _id(*parts: str) -> str:
    return "nl" + hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:23]
