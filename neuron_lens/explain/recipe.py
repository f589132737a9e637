"""How the model and the corpus of a run are had again, for commands that are given its folder only.

    {"model": name or path, "corpus": [paths] or None for the shipped sample, "folder": where relative ones begin,
     "sae": path or name or None}

What was opened otherwise cannot be opened by a command: then there is no recipe. Whether what is opened again is still
the same is held to the fingerprints in the manifest, not believed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.transformer import Transformer

__all__ = ["lasting", "recipe_of"]


def recipe_of(model: Transformer, corpus: Corpus, others: Sequence[object] = ()) -> dict[str, Any]:
    """The recipe of a run made by script, empty where model or corpus cannot be opened by name and path alone.

    A run with `others`, autoencoders or directions held in memory, has none.
    """
    if model.loaded_from is None or corpus.paths is None or others:
        return {}
    return {
        "model": lasting(model.loaded_from),
        "corpus": list(corpus.paths),
        "folder": corpus.base,
        "sae": None,
    }


def lasting(path: str) -> str:
    """A path that is right from everywhere; names and addresses stay."""
    return os.path.abspath(path) if Path(path).exists() else path
