"""Rows in batches, each with the row a stopped pass would go on with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from neuron_lens.harvest.corpus import Row

__all__ = ["row_batches"]


def row_batches(rows: Iterable[Row], size: int) -> Iterator[tuple[list[Row], Row | None]]:
    """Batches of rows, each with the row that follows it (None: it is the last)."""
    batch: list[Row] = []
    for row in rows:
        if len(batch) == size:
            yield batch, row
            batch = []
        batch.append(row)
    if batch:
        yield batch, None
