"""What commands that make a run share: which model, units, text and folder, and how they become a pipeline."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_lens.cli.arguments import whole_number
from neuron_lens.errors import RequestError

if TYPE_CHECKING:
    from neuron_lens.autoencoders import Autoencoder
    from neuron_lens.explain.pipeline import Pipeline
    from neuron_lens.explain.recipe import Recipe, SourceRecipe
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.harvest.sources import Direction
    from neuron_lens.records import Unit

__all__ = [
    "add_corpus_options",
    "add_unit_options",
    "corpus_of",
    "folder_of",
    "named_units",
    "pipeline_of",
    "pipeline_of_folder",
    "units_of",
]

DEFAULT_MODEL = "pico"
_SAMPLE = "pico/sample"  # in model_defs: text no shipped model was trained on

_TEXT_KEY = "text"

_NOUNS = ("neuron", "head", "latent")  # what can be named; each also as a plural that takes several


def add_unit_options(parser: argparse.ArgumentParser) -> None:
    """Model, units, text, folder and seed."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        help="a shipped or hub name, or a checkpoint folder (default: %(default)s)",
    )
    parser.add_argument(
        "--layer", type=int, metavar="L", help="layer, from 0 (default: the middle one, or --sae's)"
    )
    which = parser.add_mutually_exclusive_group()
    for noun, initial in zip(_NOUNS, "NHN", strict=True):
        whose = " of --sae" if noun == "latent" else ""
        which.add_argument(f"--{noun}", type=int, metavar=initial, help=f"one {noun}{whose}")
        which.add_argument(f"--{noun}s", metavar="A:B", help=f"a range A:B or a list A,B,C of {noun}s{whose}")
    which.add_argument(
        "--directions", metavar="FILE",
        help="vectors [width] or [n, width] of --layer in a .npy, .safetensors or .pt file",
    )  # fmt: skip
    which.add_argument("--all", action="store_true", help="every neuron of --layer, or of the model")
    parser.add_argument(
        "--site",
        metavar="SITE",
        help="path of the site the --directions lie at (default: resid.torso.post_mlp)",
    )
    parser.add_argument(
        "--sae", metavar="PATH", help="an autoencoder: folder, file, or name of the model it ships with"
    )
    add_corpus_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: explanations/<model>)")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of samples, splits and resamples (default: 0)"
    )


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    """The text, and which key of its rows holds it."""
    parser.add_argument(
        "--corpus", nargs="+", metavar="PATH", help="files, folders or globs (default: the shipped sample)"
    )
    parser.add_argument(
        "--text-key", metavar="KEY",
        help=f"which key of .jsonl and .parquet rows of --corpus holds the text (default: {_TEXT_KEY})",
    )  # fmt: skip


def folder_of(arguments: argparse.Namespace) -> Path:
    """The run folder, found to be writable."""
    out: Path = arguments.out or Path("explanations") / Path(arguments.model).name
    _require_writable(out)
    return out


def pipeline_of(arguments: argparse.Namespace, out: Path, **options: Any) -> Pipeline:
    """The pipeline that was asked for, into a folder; `options` are the pipeline's own."""
    from neuron_lens.explain.direction_file import DEFAULT_SITE, directions_of_file
    from neuron_lens.explain.recipe import Recipe, SourceRecipe, lasting
    from neuron_lens.explain.run_folder import RunFolder

    if RunFolder.is_one(arguments.model):
        raise RequestError(
            f"{arguments.model} is a run folder, not a model: give the model, and the folder with --out"
        )
    directions = []
    if arguments.directions is not None:
        directions = directions_of_file(
            arguments.directions, arguments.layer, DEFAULT_SITE if arguments.site is None else arguments.site
        )
    corpus = corpus_of(arguments.corpus, text_key=arguments.text_key)
    autoencoders = [SourceRecipe(kind="autoencoder", path=lasting(arguments.sae))] if arguments.sae else []
    recipe = Recipe(
        model=lasting(arguments.model),
        corpus=arguments.corpus and tuple(arguments.corpus),
        folder=os.getcwd(),
        text_key=corpus.text_key,
        sources=tuple(autoencoders),
    )
    return _pipeline(
        recipe,
        corpus,
        out,
        {"seed": arguments.seed},
        directions=directions,
        name=Path(arguments.model).name,
        progress=not arguments.quiet,
        **options,
    )


def pipeline_of_folder(folder: Path, **options: Any) -> Pipeline:
    """The pipeline a run folder was made by, explainer included, from what its manifest says.

    Raises RequestError for a folder that is no run, or was made by a script from a model or corpus that no name or path
    opens.
    """
    from neuron_lens.explain.run_folder import RunFolder

    manifest = RunFolder(folder).require_manifest()
    recipe = manifest.recipe
    if recipe is None:
        raise RequestError(
            f"{folder} was made by a script from what no name or path opens (a model made or changed by hand, text in "
            "memory): use neuron_lens.explain.Pipeline with the same"
        )
    return _pipeline(
        recipe,
        corpus_of(recipe.corpus, manifest.corpus.name, recipe.folder, recipe.text_key),
        folder,
        manifest.harvest,
        name=manifest.model.name,
        **options,
    )


def _pipeline(
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    harvest: dict[str, Any],
    *,
    directions: Sequence[Direction] = (),
    **options: Any,
) -> Pipeline:
    """With the autoencoders of the recipe, its directions, and those given."""
    from neuron_lens.autoencoders import Autoencoder
    from neuron_lens.explain.pipeline import Pipeline
    from neuron_lens.harvest.corpus import WindowShape
    from neuron_lens.harvest.settings import HarvestSettings, fitting_shape
    from neuron_lens.transformer import Transformer

    opened = [_opened(out, one) for one in recipe.sources]
    model = Transformer.load(recipe.model)
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in harvest.items()
    }
    shape = WindowShape(**plain.pop("shape")) if "shape" in plain else fitting_shape(model)
    return Pipeline(
        model=model.eval(),
        corpus=corpus,
        folder=out,
        settings=HarvestSettings(shape=shape, **plain),
        autoencoders=[source for _, source in opened if isinstance(source, Autoencoder)],
        directions=[
            *(source for _, source in opened if not isinstance(source, Autoencoder)),
            *directions,
        ],
        recipe=recipe.model_copy(update={"sources": tuple(one for one, _ in opened)}),
        **options,
    )


def _opened(folder: Path, recipe: SourceRecipe) -> tuple[SourceRecipe, Autoencoder | Direction]:
    """An autoencoder or direction of a run, and the recipe with the name it has."""
    from neuron_lens.explain.kept_sources import open_kept
    from neuron_lens.harvest.sources import dictionary_of

    if not recipe.path:
        return recipe, open_kept(folder, recipe)
    autoencoder = _autoencoder(recipe.path)
    dictionary = dictionary_of(autoencoder)
    if recipe.dictionary not in ("", dictionary):
        raise RequestError(
            f"{folder} was made with the autoencoder {recipe.dictionary} at {recipe.path}, which now holds another, "
            f"{dictionary}: put the first one back, or give another folder"
        )
    return recipe.model_copy(update={"dictionary": dictionary}), autoencoder


def _autoencoder(path_or_name: str) -> Autoencoder:
    """The autoencoder at a path, or the one that ships with a model of that name; computed in float32."""
    import torch

    from neuron_lens.autoencoders import load_autoencoder
    from neuron_lens.cli.sae import shipped_autoencoder

    path = Path(path_or_name)
    return load_autoencoder(path if path.exists() else shipped_autoencoder(path_or_name), dtype=torch.float32)


def corpus_of(
    paths: Sequence[str] | None,
    name: str | None = None,
    base: str | None = None,
    text_key: str | None = None,
) -> Corpus:
    """The text at the paths, called `name` and relative to `base` if these are given, or the shipped sample."""
    from neuron_lens.files.model_defs import model_defs_dir
    from neuron_lens.harvest.corpus import Corpus

    if paths is not None:
        return Corpus.of_paths(paths, name, base=base, text_key=text_key or _TEXT_KEY)
    if text_key not in (None, _TEXT_KEY):
        raise RequestError(f"--text-key {text_key} says how to read rows of --corpus; give that, too")
    return Corpus.of_paths([model_defs_dir() / _SAMPLE], name="the shipped sample")


def _require_writable(out: Path) -> None:
    """Fail before the work, not after it. Folders made on the way are taken away again."""
    from neuron_lens.files.atomic import atomic_path

    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with atomic_path(out / ".writable"):
            pass
        (out / ".writable").unlink()
    finally:
        for folder in new:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def named_units(arguments: argparse.Namespace) -> tuple[str, list[int] | None]:
    """The kind of unit, and the numbers named, None when none are."""
    if arguments.directions is not None:
        return _named_directions(arguments), None
    if arguments.site is not None:
        raise RequestError(f"--site {arguments.site} is where --directions lie; give a file of those, too")
    noun, numbers = ("latent", None) if arguments.sae else ("neuron", None)
    for each in _NOUNS:
        one, several = getattr(arguments, each), getattr(arguments, f"{each}s")
        if one is not None or several is not None:
            noun, numbers = each, [one] if several is None else _parsed(several, each)
    if (noun == "latent") != bool(arguments.sae):
        raise RequestError(
            "latents are those of an autoencoder: say which with --sae PATH (or --sae pico)"
            if noun == "latent"
            else f"--sae goes with --latent or --latents, not with --{noun}"
        )
    if arguments.all and noun == "latent":
        raise RequestError("--all means neurons; name latents as a range, such as --latents 0:256")
    for name, value in (
        ("--layer", arguments.layer),
        (f"a {noun}", min(numbers, default=0) if numbers else 0),
    ):
        if value is not None and value < 0:
            raise RequestError(f"{name} is counted from 0; got {value}")
    return noun, numbers


def _named_directions(arguments: argparse.Namespace) -> str:
    if arguments.sae:
        raise RequestError("--sae goes with --latent or --latents, not with --directions")
    if arguments.layer is None or arguments.layer < 0:
        given = "none was" if arguments.layer is None else f"{arguments.layer} was"
        raise RequestError(f"--directions lie in one layer: say which with --layer, from 0; {given} given")
    return "direction"


def _parsed(text: str, noun: str) -> list[int]:
    """ "0:16" or "3,5,8" to numbers."""
    try:
        if ":" in text:
            first, last = text.split(":")
            numbers = list(range(int(first or 0), int(last)))
        else:
            numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(
            f"--{noun}s {text!r}: expected a range such as 0:16 or a list such as 3,5,8"
        ) from None
    if not numbers:
        raise RequestError(
            f"--{noun}s {text!r} names no {noun}: the end of a range is left out, as in Python"
        )
    return list(dict.fromkeys(numbers))


def units_of(pipeline: Pipeline, arguments: argparse.Namespace) -> tuple[Unit, ...]:
    """The units asked for."""
    noun, numbers = named_units(arguments)
    config, layer = pipeline.model.config, arguments.layer
    if noun == "direction":
        return pipeline.directed()
    if noun == "latent":
        width = pipeline.autoencoders[0].config.d_latent
        spread = list(range(0, width, max(1, width // 8)))[:8]
        units = pipeline.latents(spread if numbers is None else numbers)
        if layer is not None and layer != units[0].layer:
            raise RequestError(f"this autoencoder reads layer {units[0].layer}, not layer {layer}")
        return units
    chosen = config.n_layers // 2 if layer is None else layer
    if noun == "head" and numbers is not None:
        return pipeline.heads(chosen, numbers)
    if arguments.all:
        layers = range(config.n_layers) if layer is None else [layer]
        return tuple(unit for each in layers for unit in pipeline.neurons(each, range(config.d_mlp)))
    return pipeline.default_units(layer) if numbers is None else pipeline.neurons(chosen, numbers)
