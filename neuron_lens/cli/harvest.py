"""`neuron-lens harvest`: run a corpus through a model and keep what units do on it, for the other commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from neuron_lens.cli.run_options import add_unit_options, folder_of, named_units, pipeline_of, units_of
from neuron_lens.errors import RequestError

if TYPE_CHECKING:
    from neuron_lens.explain.pipeline import Pipeline

__all__ = ["add", "run"]

_EXAMPLES = """\
examples:
  neuron-lens harvest pico --layer 2 --out run            all neurons of a layer: they are read together
  neuron-lens harvest pico --all --out run                of all layers, in one pass
  neuron-lens harvest pico --sae pico --latents 0:64 --out run
  neuron-lens harvest pico --sae pico --format delphi --out cache     all latents, as Delphi's latent cache
  neuron-lens harvest pico --layer 2 --directions probes.npy --out run
  neuron-lens harvest pico --all --corpus rows.parquet --text-key body --out run
  neuron-lens explain pico --layer 2 --neuron 17 --out run    starts from what was harvested

A harvest that was stopped goes on when the same command is given again.
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "harvest",
        help="read a corpus with a model and keep what its units do, without explaining them",
        description="Read a corpus with a model and keep, of every unit, what it does most and what it does at random.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_unit_options(parser)
    parser.add_argument(
        "--format",
        default="run",
        choices=["run", "delphi"],
        help="a run folder (default), or Delphi's latent cache of all latents of --sae",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Harvest, and say what the folder holds."""
    _, numbers = named_units(arguments)  # refused before anything is loaded
    if arguments.format == "delphi" and (not arguments.sae or numbers is not None):
        raise RequestError(
            "--format delphi writes all latents of an autoencoder: give --sae, and no --latents"
        )
    out = folder_of(arguments)
    pipeline = pipeline_of(arguments, out, pages=False)
    if arguments.format == "delphi":
        return _delphi(pipeline, arguments)
    manifest = pipeline.harvest(units_of(pipeline, arguments))
    print(
        f"{out} holds {manifest.model.name} on {manifest.corpus.name}, {manifest.corpus.n_documents} documents:"
    )
    for source in manifest.sources:
        which = "all" if source.indices is None else f"{len(source.indices)}"
        print(f"  layer {source.layer}: {which} {source.kind}s at {source.site} {source.dictionary}".rstrip())
    return 0


def _delphi(pipeline: Pipeline, arguments: argparse.Namespace) -> int:
    from neuron_lens.harvest.delphi_cache import write_delphi_cache

    cache = write_delphi_cache(
        pipeline.model,
        pipeline.autoencoders[0],
        pipeline.corpus,
        pipeline.folder,
        model_name=arguments.model,
        progress=not arguments.quiet,
    )
    rows, context = cache.tokens.shape
    print(f"{cache.folder} holds {len(cache.latents)} latents on {rows} rows of {context} tokens")
    return 0
