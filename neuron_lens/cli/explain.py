"""`neuron-lens explain`: the main job, from a model's name to explanations, scores and pages."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_lens.errors import RequestError

if TYPE_CHECKING:
    from neuron_lens.autoencoders import Autoencoder
    from neuron_lens.explain.pipeline import Pipeline
    from neuron_lens.explain.result import RunResult, Score
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.records import Unit

__all__ = ["add", "corpus_of", "run", "summary_table"]

DEFAULT_MODEL = "pico"
_SAMPLE = "pico/sample"  # in model_defs: text no shipped model was trained on

_NOUNS = ("neuron", "head", "latent")  # what can be named; each also as a plural that takes several

_COLUMNS = "{:<18}{:<22}{:>8}{:>9}{:>6}{:>8}  {}"

_EXAMPLES = """\
examples:
  neuron-lens explain                                  eight neurons of the shipped model's middle layer
  neuron-lens explain pico --layer 2 --neuron 17       one neuron
  neuron-lens explain pico --layer 2 --neurons 0:16    a range (the end is left out), or a list: 3,5,8
  neuron-lens explain pico --all                       every neuron; can be stopped and started again
  neuron-lens explain pico --sae pico --latent 42      a latent of the autoencoder that ships with pico
  neuron-lens explain gpt2 --sae folder --latents 0:64 latents of an autoencoder in any published format
  neuron-lens explain pico --layer 3 --heads 0:6       attention heads
  neuron-lens explain pico --corpus src/ 'notes/*.md'  on other text
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "explain",
        help="explain neurons, heads and latents of a model: sentences, scores, causal effects, pages",
        description="Explain neurons, attention heads and latents. Runs offline, on any text, without a key.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="a shipped or hub name, or a checkpoint folder"
    )
    parser.add_argument("--layer", type=int, metavar="L", help="layer, from 0 (default: the middle one)")
    which = parser.add_mutually_exclusive_group()
    for noun, initial in zip(_NOUNS, "NHN", strict=True):
        whose = " of --sae" if noun == "latent" else ""
        which.add_argument(f"--{noun}", type=int, metavar=initial, help=f"one {noun}{whose}")
        which.add_argument(f"--{noun}s", metavar="A:B", help=f"a range A:B or a list A,B,C of {noun}s{whose}")
    which.add_argument("--all", action="store_true", help="every neuron of --layer, or of the model")
    parser.add_argument(
        "--sae", metavar="PATH", help="an autoencoder: folder, file, or name of the model it ships with"
    )
    parser.add_argument(
        "--corpus", nargs="+", metavar="PATH", help="files, folders or globs (default: the shipped sample)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: explanations/<model>)")
    parser.add_argument("--seed", type=int, default=0, help="of samples, splits and resamples (default: 0)")
    parser.add_argument("--no-pages", action="store_true", help="write no HTML")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Explain what was asked for, print the table and where the pages are."""
    noun, numbers = _named(arguments)
    out = arguments.out or Path("explanations") / Path(arguments.model).name
    _require_writable(out)
    corpus = corpus_of(arguments.corpus)
    pipeline = _pipeline(arguments, corpus, out)
    units = _units(pipeline, arguments, noun, numbers)
    result = pipeline.run(units)
    wanted = {unit.name for unit in units}
    print(summary_table(result, wanted, width=shutil.get_terminal_size((110, 24)).columns))
    _print_paths(result, wanted, out, pages=not arguments.no_pages)
    return 0


def _pipeline(arguments: argparse.Namespace, corpus: Corpus, out: Path) -> Pipeline:
    from neuron_lens.explain.pipeline import Pipeline
    from neuron_lens.harvest.run import HarvestSettings, fitting_shape
    from neuron_lens.transformer import Transformer

    autoencoders = [_autoencoder(arguments.sae)] if arguments.sae else []
    model = Transformer.load(arguments.model)
    return Pipeline(
        model=model.eval(),
        corpus=corpus,
        folder=out,
        name=Path(arguments.model).name,
        settings=HarvestSettings(shape=fitting_shape(model), seed=arguments.seed),
        pages=not arguments.no_pages,
        progress=not arguments.quiet,
        autoencoders=autoencoders,
    )


def _autoencoder(path_or_name: str) -> Autoencoder:
    """The autoencoder at a path, or the one that ships with a model of that name; computed in float32."""
    import torch

    from neuron_lens.autoencoders import load_autoencoder
    from neuron_lens.cli.sae import shipped_autoencoder

    path = Path(path_or_name)
    return load_autoencoder(path if path.exists() else shipped_autoencoder(path_or_name), dtype=torch.float32)


def corpus_of(paths: Sequence[str] | None) -> Corpus:
    """The text that was named, or the shipped sample."""
    from neuron_lens.files.model_defs import model_defs_dir
    from neuron_lens.harvest.corpus import Corpus

    if paths is not None:
        return Corpus.of_paths(paths)
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


def _named(arguments: argparse.Namespace) -> tuple[str, list[int] | None]:
    """The kind of unit, and the numbers named, None when none are."""
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


def _units(
    pipeline: Pipeline, arguments: argparse.Namespace, noun: str, numbers: list[int] | None
) -> tuple[Unit, ...]:
    """The units asked for."""
    config, layer = pipeline.model.config, arguments.layer
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


def summary_table(result: RunResult, wanted: set[str], width: int = 110, limit: int = 40) -> str:
    """A table of the units with their scores beside the controls, each with its explanation below.

    `wanted` are the names of the units shown; above `limit` of them only the distribution is printed.
    """
    rows = [row for row in result.units if row.unit.name in wanted]
    facts = result.run
    lines = [
        f"{result.model.name} on {facts.corpus}: {facts.n_documents} documents, {facts.n_tokens:,} tokens"
    ]
    if len(rows) > limit:
        return "\n".join([*lines, _distribution([row.scores["correlation"] for row in rows])])
    lines.append("")
    lines.append(
        _COLUMNS.format(
            "unit", "correlation (95 %)", "another", "shuffled", "AUC", "fires", "loss if ablated"
        )
    )
    for row in rows:
        another, shuffled = (row.controls[name]["correlation"] for name in ("another_unit", "shuffled"))
        lines.append(
            _COLUMNS.format(
                f"L{row.unit.layer} {row.unit.kind} {row.unit.index}",
                _interval(row.scores["correlation"]),
                _value(another),
                _value(shuffled),
                _value(row.scores["detection_auc"]),
                f"{row.density:.2%}",
                "-" if row.loss_change is None else _interval(row.loss_change, "+.3f"),
            )
        )
        lines.extend(textwrap.wrap("    " + row.sentence, max(width, 44), subsequent_indent="    "))
    return "\n".join(lines)


def _distribution(scores: list[Score]) -> str:
    """How many units reach what, by the lower end of the interval."""
    known = [score for score in scores if score.low is not None]
    reached = ", ".join(
        f"{sum(score.low is not None and score.low > level for score in known)} above {level}"
        for level in (0.25, 0.5, 0.75)
    )
    return (
        f"{len(scores)} units, {len(known)} with a score; lower end of the correlation's interval: {reached}"
    )


def _interval(score: Score, form: str = ".2f") -> str:
    if score.value is None or score.low is None or score.high is None:
        return "-"
    return f"{score.value:{form}} [{score.low:{form}}, {score.high:{form}}]"


def _value(score: Score) -> str:
    return "-" if score.value is None else f"{score.value:.2f}"


def _print_paths(result: RunResult, wanted: set[str], out: Path, *, pages: bool) -> None:
    first = next(row for row in result.units if row.unit.name in wanted)
    file = "index.html" if pages else "result.json"
    print(f"\nresults: {out / 'run.json'}")
    print(
        f"{'page' if pages else 'unit'}: {out / first.path / file}"
        + (f" (and {len(wanted) - 1} more)" if len(wanted) > 1 else "")
    )
    if pages:
        print(f"index: {out / 'index.html'}")
    sys.stdout.flush()
