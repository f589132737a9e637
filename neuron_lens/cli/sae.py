"""`neuron-lens sae train` and `neuron-lens sae evaluate`: sparse autoencoders of a model's activations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_lens.cli.arguments import whole_number
from neuron_lens.cli.run_options import add_corpus_options, corpus_of
from neuron_lens.errors import RequestError

if TYPE_CHECKING:
    from neuron_lens.autoencoder_training import Evaluation, TrainingSettings
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.harvest.dense import StoredActivations
    from neuron_lens.transformer import Transformer

__all__ = ["add", "run", "shipped_autoencoder"]

_OWN_SAE = "sae"  # folder of the autoencoder that ships with a model

_EXAMPLES = """\
examples:
  neuron-lens sae train pico --layer 2 --width 1024 --k 16 --tokens 200000
  neuron-lens sae train gpt2 --layer 6 --width 24576 --activation jumprelu --sparsity 1e-3 --corpus text/
  neuron-lens sae train gpt2 --layer 6 --width 24576 --k 32 --corpus text/ --stored activations/gpt2-6
  neuron-lens sae evaluate pico                               the autoencoder that ships with pico
  neuron-lens sae evaluate gpt2 --sae downloads/gpt2-sae --corpus text/ --out evaluation

Figures are printed, and written as evaluation.json and as a page, evaluation.html, that needs no network.

A training run that was stopped goes on when the same command is given again.
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "sae",
        help="train and evaluate sparse autoencoders",
        description="Train and evaluate sparse autoencoders.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    _add_train(actions.add_parser("train", help="train one on a site of a model"))
    _add_evaluate(actions.add_parser("evaluate", help="variance explained, L0, loss recovered, dead latents"))


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a shipped or hub name, or a checkpoint folder")
    parser.add_argument(
        "--site", default="resid.torso.post_mlp", help="path of the site (default: %(default)s)"
    )
    parser.add_argument(
        "--layer", type=int, metavar="L", help="layer, from 0; left out for sites outside the blocks"
    )
    parser.add_argument("--width", type=whole_number(1), required=True, metavar="N", help="number of latents")
    parser.add_argument(
        "--activation",
        default="topk",
        choices=["relu", "topk", "batch_topk", "jumprelu", "gated"],
        help="what keeps few latents active (default: %(default)s)",
    )
    parser.add_argument(
        "--k", type=whole_number(1), metavar="K", help="topk, batch_topk: active latents per token"
    )
    parser.add_argument("--groups", metavar="A,B,…", help="batch_topk: sizes of nested groups (matryoshka)")
    parser.add_argument("--sparsity", type=float, help="relu, gated: about 1 to 10; jumprelu: about 1e-3")
    parser.add_argument(
        "--tokens", type=whole_number(1), default=2_000_000, help="training tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=whole_number(1), default=2048, help="tokens per step (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, help="default: from the width")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--site-out", metavar="SITE", help="train a transcoder: the site that is predicted")
    parser.add_argument("--layer-out", type=int, metavar="L", help="of --site-out (default: --layer)")
    parser.add_argument("--skip", action="store_true", help="a transcoder with a linear skip term")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of weights, order and parts (default: 0)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: autoencoders/<model>)")
    parser.add_argument(
        "--stored",
        type=Path,
        metavar="FOLDER",
        help="train from activations on disk: those stored there, or stored there first, for any number of runs",
    )
    _add_common(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a shipped or hub name, or a checkpoint folder")
    parser.add_argument(
        "--sae", metavar="PATH", help="folder or file (default: the one that ships with the model)"
    )
    parser.add_argument("--site", help="path of the site (default: the autoencoder's own)")
    parser.add_argument("--layer", type=int, metavar="L", help="layer (default: the autoencoder's own)")
    parser.add_argument(
        "--split",
        default="test",
        choices=["train", "validation", "test", "all"],
        help="the part of the text (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens", type=whole_number(1), default=100_000, help="at most so many (default: %(default)s)"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the corpus's division into parts")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for both files (default: evaluations/<model>)"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_corpus_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for, and print figures and paths."""
    return _train(arguments) if arguments.action == "train" else _evaluate(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from neuron_lens.autoencoder_training import evaluate_autoencoder, train_autoencoder

    settings = _settings(arguments)
    corpus = corpus_of(arguments.corpus, text_key=arguments.text_key)
    model = _model(arguments.model)
    folder = arguments.out or Path("autoencoders") / Path(arguments.model).name
    source = corpus if arguments.stored is None else _stored(arguments, model, corpus, settings)
    trained = train_autoencoder(model, source, settings, folder, progress=not arguments.quiet)
    evaluation = evaluate_autoencoder(
        model, trained, corpus, seed=settings.seed, max_tokens=100_000, progress=not arguments.quiet
    )
    _write(evaluation, folder, f"autoencoder: {folder} ({_format_of(folder)} format)")
    return 0


def _stored(
    arguments: argparse.Namespace, model: Transformer, corpus: Corpus, settings: TrainingSettings
) -> StoredActivations:
    """The activations of the training part of the text, stored now where they are not yet."""
    from neuron_lens.harvest.dense import StoredActivations, store_activations

    found = StoredActivations.find(arguments.stored)
    if found is None:
        places = [(settings.site, settings.layer), *([settings.target] if settings.target else [])]
        inside = [(site, layer) for site, layer in places if layer is not None]
        if len(inside) < len(places):
            raise RequestError("--stored holds sites inside the blocks: say which --layer")
        return store_activations(
            model,
            corpus,
            inside,
            arguments.stored,
            split="train",
            seed=settings.seed,
            progress=not arguments.quiet,
        )
    if found.manifest["key"]["corpus"] != corpus.fingerprint:
        raise RequestError(
            f"{arguments.stored} holds activations on another corpus; give that one with --corpus (what was trained is "
            "evaluated on its test part), or another folder"
        )
    return found


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from neuron_lens.autoencoder_training import evaluate_autoencoder
    from neuron_lens.autoencoders import load_autoencoder

    path = Path(arguments.sae) if arguments.sae else shipped_autoencoder(arguments.model)
    autoencoder = load_autoencoder(path, dtype=torch.float32)
    evaluation = evaluate_autoencoder(
        _model(arguments.model),
        autoencoder,
        corpus_of(arguments.corpus, text_key=arguments.text_key),
        site=arguments.site,
        layer=arguments.layer,
        split=arguments.split,
        max_tokens=arguments.tokens,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    _write(evaluation, arguments.out or Path("evaluations") / Path(arguments.model).name)
    return 0


def _settings(arguments: argparse.Namespace) -> TrainingSettings:
    from neuron_lens.autoencoder_training import TrainingSettings

    try:
        groups = tuple(int(size) for size in arguments.groups.split(",")) if arguments.groups else None
    except ValueError:
        raise RequestError(f"--groups {arguments.groups!r}: expected sizes such as 256,256,512") from None
    return TrainingSettings(
        site=arguments.site,
        layer=arguments.layer,
        site_out=arguments.site_out,
        layer_out=arguments.layer_out,
        skip=arguments.skip,
        d_latent=arguments.width,
        activation=arguments.activation,
        k=arguments.k,
        group_sizes=groups,
        sparsity=arguments.sparsity,
        n_tokens=arguments.tokens,
        batch_tokens=arguments.batch,
        learning_rate=arguments.learning_rate,
        autocast=arguments.bf16,
        seed=arguments.seed,
    )


def _model(name: str) -> Transformer:
    from neuron_lens.transformer import Transformer

    return Transformer.load(name).eval()


def shipped_autoencoder(model: str) -> Path:
    """The autoencoder that ships with a model."""
    from neuron_lens.files.model_defs import model_defs_dir

    folder = model_defs_dir() / model / _OWN_SAE
    if not folder.is_dir():
        raise RequestError(f"no autoencoder ships with {model!r}: say which with --sae PATH")
    return folder


def _format_of(folder: Path) -> str:
    return "SAELens" if (folder / "cfg.json").exists() else "circuit-tracer"


def _write(evaluation: Evaluation, folder: Path, first: str = "") -> None:
    """Print the figures, and write them to a folder as JSON and as a page."""
    from neuron_lens.files.atomic import write_text_atomic
    from neuron_lens.report import autoencoder_page

    json, page = folder / "evaluation.json", folder / "evaluation.html"
    write_text_atomic(json, evaluation.model_dump_json(indent=2) + "\n")
    write_text_atomic(page, autoencoder_page(evaluation.model_dump(mode="json")))
    print(_table(evaluation))
    print("\n".join(["", *filter(None, [first]), f"evaluation: {json}", f"page: {page}"]))


def _table(evaluation: Evaluation) -> str:
    """The figures, a line each."""
    from neuron_lens.report.autoencoder import evaluation_facts

    e = evaluation
    where = e.site if e.layer is None else f"{e.site}, layer {e.layer}"
    lines = [f"{e.model}, {where}, on {e.corpus} ({e.split}): {e.n_tokens:,} tokens", ""]
    return "\n".join([*lines, *(f"{name:<32}{value}" for name, value in evaluation_facts(e.model_dump()))])
