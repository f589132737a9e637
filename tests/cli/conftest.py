"""What most commands are tried on: a folder of text, and the planted model in place of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from explain import planted


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A corpus folder."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, document in enumerate(planted.corpus(12)):
        (folder / f"{number:02}.txt").write_text(document.text)
    return folder


@pytest.fixture
def planted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name opens the planted model."""
    from neuron_lens.transformer import Transformer

    monkeypatch.setattr(Transformer, "load", classmethod(lambda cls, name: planted.model()))
