"""Copies of the autoencoders and directions a run was made with, in its folder, exact to the bit.

    sources/<dictionary>.safetensors     its tensors; in the header, under "neuron_lens", what it is, as JSON

Published formats round what they cannot say, and the units of what was rounded would be filed under another name. Every
file is written whole, and read only where a hash of its content is the one noted when it was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_lens.errors import CheckpointError, RequestError
from neuron_lens.explain.recipe import Recipe, SourceRecipe
from neuron_lens.files.atomic import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_lens.autoencoders import Autoencoder
    from neuron_lens.harvest.sources import Direction

    Content = tuple[str, dict[str, Tensor]]  # what it is, as JSON, and its tensors

__all__ = ["KeptSources", "kept_path", "open_kept"]

_FOLDER = "sources"
_HEADER = "neuron_lens"


class KeptSources:
    """The autoencoders (by dictionary) and directions a pipeline holds, as a recipe notes and a folder keeps them."""

    def __init__(self, autoencoders: Mapping[str, Autoencoder], directions: Sequence[Direction]) -> None:
        self._held: list[tuple[str, Autoencoder | Direction]] = [*autoencoders.items()]
        self._held += [(each.dictionary, each) for each in directions]

    def added(self, recipe: Recipe | None, used: Collection[str]) -> Recipe | None:
        """The recipe with those of the `used` dictionaries that it does not name; None stays None."""
        if recipe is None:
            return None
        return recipe.with_sources(one for one in self._noted if one.dictionary in used)

    def write(self, folder: Path, recipe: Recipe | None) -> None:
        """Copy those the recipe wants kept into a run folder. Raises RequestError where it cannot be written."""
        for one in recipe.sources if recipe else ():
            if one in self._noted:
                _keep(folder, one, self._noted[one])

    @cached_property
    def _noted(self) -> dict[SourceRecipe, Autoencoder | Direction]:
        return {_noted(source, dictionary): source for dictionary, source in self._held}


def _noted(source: Autoencoder | Direction, dictionary: str) -> SourceRecipe:
    from neuron_lens.harvest.sources import Direction

    digest = _digest(_content(source))
    if isinstance(source, Direction):
        return SourceRecipe(
            kind="direction",
            dictionary=dictionary,
            digest=digest,
            name=source.name,
            site=source.site,
            layer=source.layer,
        )
    return SourceRecipe(kind="autoencoder", dictionary=dictionary, digest=digest)


def kept_path(folder: Path, recipe: SourceRecipe) -> Path:
    """Where the copy of a source lies in a run folder."""
    return folder / _FOLDER / f"{recipe.dictionary}.safetensors"


def _keep(folder: Path, recipe: SourceRecipe, source: Autoencoder | Direction) -> None:
    """Copy it, unless a whole copy is there."""
    from safetensors.torch import save_file

    path = kept_path(folder, recipe)
    if path.is_file() and _is_whole(path, recipe):
        return
    described, tensors = _content(source)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER: described})


def open_kept(folder: Path, recipe: SourceRecipe) -> Autoencoder | Direction:
    """The source a folder keeps a copy of.

    Raises RequestError for a copy that is not there or not what was written.
    """
    from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig
    from neuron_lens.harvest.sources import Direction

    path = kept_path(folder, recipe)
    what_to_do = (
        "put it back, or run neuron_lens.explain.Pipeline with the same source, which writes it again"
    )
    if not path.is_file():
        raise RequestError(
            f"{folder} was made with the {recipe.kind} {recipe.dictionary}, whose copy {path} is not there; {what_to_do}"
        )
    if not _is_whole(path, recipe):
        raise RequestError(
            f"{path} is not the {recipe.kind} {recipe.dictionary} this run was made with: it is damaged or another's; "
            f"{what_to_do}"
        )
    described, tensors = _read(path)
    if recipe.kind == "direction":
        assert recipe.layer is not None, "a direction is noted with its layer"
        direction = Direction(recipe.name, tensors["vector"], recipe.site, recipe.layer)
        direction.vector = tensors["vector"]  # of length 1 already: dividing again would change its last bits
        return direction
    autoencoder = Autoencoder(AutoencoderConfig(**json.loads(described)["config"]), device="meta")
    autoencoder.load_state_dict(tensors, assign=True)
    return autoencoder.eval()


def _content(source: Autoencoder | Direction) -> Content:
    from neuron_lens.harvest.sources import Direction

    described: dict[str, Any]
    if isinstance(source, Direction):
        described, tensors = {"kind": "direction"}, {"vector": source.vector}
    else:
        described = {
            "kind": "autoencoder",
            "config": source.config.model_dump(mode="json", exclude={"provenance"}),
        }
        tensors = source.state_dict()
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return json.dumps(described, sort_keys=True), ready


def _read(path: Path) -> Content:
    """Raises CheckpointError for what is no such file."""
    from safetensors import safe_open

    from neuron_lens.files.safetensors import SafetensorsSource

    found = SafetensorsSource(path.parent, [path])
    with safe_open(path, "pt") as opened:
        described = (opened.metadata() or {}).get(_HEADER, "")
    return described, {name: found.read(name) for name in found.names()}


def _is_whole(path: Path, recipe: SourceRecipe) -> bool:
    try:
        return _digest(_read(path)) == recipe.digest
    except CheckpointError:
        return False


def _digest(content: Content) -> str:
    import torch

    described, tensors = content
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
