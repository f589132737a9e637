"""A run as a table: one flat row a unit, as dicts, a data frame, or a file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_lens.errors import MissingExtraError, RequestError
from neuron_lens.explain.result import RunResult, Score, UnitSummary
from neuron_lens.files.atomic import write_text_atomic

if TYPE_CHECKING:
    import pandas

__all__ = ["data_frame", "rows_of", "save_run"]


def rows_of(run: RunResult) -> list[dict[str, Any]]:
    """See `RunResult.to_rows`."""
    return [_flat(unit) for unit in run.units]


def data_frame(run: RunResult) -> pandas.DataFrame:
    """See `RunResult.to_dataframe`."""
    try:
        import pandas
    except ImportError:
        raise MissingExtraError("pandas", "report", "a data frame of a run") from None
    return pandas.DataFrame(rows_of(run))


def save_run(run: RunResult, path: Path | str) -> None:
    """See `RunResult.save`."""
    path = Path(path)
    if path.suffix == ".json":
        content = run.model_dump_json() + "\n"
    elif path.suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(run))
    elif path.suffix == ".csv":
        rows, file = rows_of(run), io.StringIO()
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        content = file.getvalue()
    else:
        raise RequestError(
            f"cannot save a run as {path.name}: give a name that ends in .csv, .jsonl or .json"
        )
    write_text_atomic(path, content)


def _flat(unit: UnitSummary) -> dict[str, Any]:
    place = unit.unit
    row: dict[str, Any] = {
        "unit": place.name,
        "kind": place.kind,
        "layer": place.layer,
        "index": place.index,
        "sentence": unit.sentence,
        "density": unit.density,
        "maximum": unit.maximum,
        "loss_change": None if unit.loss_change is None else unit.loss_change.value,
    }
    figures: list[tuple[str, Score, Score | None]] = [
        (name, score, None) for name, score in unit.scores.items()
    ]
    controls = {name: found.get("correlation") for name, found in unit.controls.items()}
    row |= {f"correlation_{name}": score.value for name, score in controls.items() if score is not None}
    figures += [(f"{one.scorer}_{one.figure}", one.score, one.control) for one in unit.judged]
    for name, score, control in figures:
        row |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        row |= {f"{name}_coverage": score.coverage}
        if control is not None:
            row[f"{name}_control"] = control.value
    return row
