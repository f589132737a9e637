"""How the model, the text and the sources of a run are had again, for commands that are given its folder only.

    {"model": name or path, "corpus": [paths] or None for the shipped sample, "folder": where relative ones begin,
     "text_key": which key of a row holds the text, "sources": [a `SourceRecipe` for each autoencoder and direction]}

A model or a corpus that was opened otherwise cannot be opened by a command: then there is no recipe. Autoencoders and
directions that were held in memory are copied into the folder; see `kept_sources`. Whether what is opened again is still
the same is held to the fingerprints in the manifest and to the names of the sources, which end in a hash, not believed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, model_validator

from neuron_lens.records import Record

if TYPE_CHECKING:
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.transformer import Transformer

__all__ = ["Recipe", "SourceRecipe", "lasting", "recipe_of"]


class SourceRecipe(Record):
    """Where one autoencoder or direction is had again: at `path`, or, without one, from its copy in the run folder.

    `dictionary` is what its units are filed under (empty for an autoencoder noted before that was), `digest` a hash of
    the copy. A direction has a name, a site and a layer besides.
    """

    kind: Literal["autoencoder", "direction"]
    dictionary: str = ""
    path: str = ""
    digest: str = ""
    name: str = ""
    site: str = ""
    layer: NonNegativeInt | None = None

    @property
    def place(self) -> tuple[str, str, str, int | None]:
        """What tells it from the others of a folder."""
        return (self.kind, self.dictionary, self.site, self.layer)


class Recipe(Record):
    """See the module. Older folders name one autoencoder at most, by its path as "sae"; that is read as a source."""

    model: str
    corpus: tuple[str, ...] | None = None
    folder: str | None = None
    text_key: str = "text"
    sources: tuple[SourceRecipe, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _one_autoencoder(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "sae" not in given:
            return given
        path = given["sae"]
        sources = [{"kind": "autoencoder", "path": path}] if path else []
        return {name: value for name, value in given.items() if name != "sae"} | {"sources": sources}

    def with_sources(self, more: Iterable[SourceRecipe]) -> Recipe:
        """With those that it has not, each once; where one is said twice, by what was said first."""
        known: dict[tuple[str, str, str, int | None], SourceRecipe] = {}
        for one in (*self.sources, *more):
            known.setdefault(one.place, one)
        named = {one.path for one in known.values() if one.dictionary}
        kept = tuple(one for one in known.values() if one.dictionary or one.path not in named)
        return self.model_copy(update={"sources": kept})


def recipe_of(model: Transformer, corpus: Corpus) -> Recipe | None:
    """The recipe of a run made by script, None where model or corpus cannot be opened by name and path alone."""
    if model.loaded_from is None or corpus.paths is None:
        return None
    return Recipe(
        model=lasting(model.loaded_from),
        corpus=corpus.paths,
        folder=corpus.base,
        text_key=corpus.text_key,
    )


def lasting(path: str) -> str:
    """A path that is right from everywhere; names and addresses stay."""
    return os.path.abspath(path) if Path(path).exists() else path
