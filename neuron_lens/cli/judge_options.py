"""What commands that ask a judge share: who explains and scores, who is asked, and what may be spent."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_lens.errors import BackendError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neuron_lens.explain.explainers import Explainer
    from neuron_lens.explain.pipeline import Pipeline
    from neuron_lens.explain.result import RunResult
    from neuron_lens.explain.scorers import BaseScorer
    from neuron_lens.llm import Backend, Budget, BudgetExceeded, Capabilities, Price
    from neuron_lens.records import Unit

__all__ = [
    "STOPPED",
    "add_judge_options",
    "add_who",
    "asked",
    "backend_of",
    "judge_options",
    "price_of",
    "stopped_by",
]

STOPPED = 3  # exit code of a run that kept to its budget

_EXPLAINERS = (
    "token_statistics", "token_activation_pairs", "max_activating", "contrastive", "logit_weights", "attention_pairs",
)  # fmt: skip


_WHO = (
    "openai:MODEL (key in OPENAI_API_KEY), openai:MODEL@URL (any compatible endpoint), local:NAME_OR_PATH (a checkpoint; "
    "…@bfloat16 to compute in that), scripted:MODULE:FUNCTION (a Python function, for tests)"
)


def add_judge_options(parser: argparse.ArgumentParser, *, explains: bool) -> None:
    """Explainer (where the command explains), scorers, judge, budget."""
    group = parser.add_argument_group("judge")
    if explains:
        group.add_argument(
            "--explainer", default="token_statistics", metavar="NAME",
            help=f"{', '.join(_EXPLAINERS)} (default: the first, which asks nobody)",
        )  # fmt: skip
        group.add_argument(
            "--candidates", type=int, default=1, metavar="N",
            help="sentences to choose one from, on validation windows (default: 1)",
        )  # fmt: skip
    group.add_argument(
        "--scorers", default="", metavar="A,B,…",
        help="detection, fuzzing, graded_detection, graded_fuzzing, intruder, simulation, ablate_to_simulation, "
        "attention_pairs, causal, surprisal, embedding; the first one chooses among candidates. Without a judge: embedding, "
        "and ablate_to_simulation of rules (token_statistics)",
    )  # fmt: skip
    group.add_argument(
        "--embedder", metavar="WHO",
        help="of the scorer embedding: local:FOLDER (a sentence-transformers model), openai:MODEL or openai:MODEL@URL (an "
        "embeddings endpoint)",
    )  # fmt: skip
    group.add_argument("--judge", metavar="WHO", help=_WHO)
    _add_asking(group)


def add_who(parser: argparse.ArgumentParser) -> None:
    """The judge by itself, how it is asked, and what it may take."""
    parser.add_argument("judge", metavar="WHO", help=_WHO)
    _add_asking(parser.add_argument_group("asking"))


def _add_asking(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--capabilities", metavar="A,B,…",
        help="what an openai: judge can do (default: chat,logprobs,json_schema); vLLM's servers do "
        "chat,logprobs,json_schema,completion,prompt_logprobs",
    )  # fmt: skip
    group.add_argument("--concurrency", type=int, default=8, metavar="N", help="calls at once (default: 8)")
    group.add_argument(
        "--dry-run", action="store_true", help="say how many calls, tokens and what cost; ask nothing"
    )
    group.add_argument(
        "--price", metavar="IN,OUT", help="of a million tokens read and written, for costs: 0.15,0.60"
    )
    group.add_argument(
        "--budget", type=float, metavar="AMOUNT", help="stop before this call of the command costs more"
    )
    group.add_argument("--max-calls", type=int, metavar="N", help="stop before it makes more calls")


def judge_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of a Pipeline."""
    scorers = [name.strip() for name in arguments.scorers.split(",") if name.strip()]
    options: dict[str, Any] = {
        "scorers": _with_embedder(scorers, arguments),
        "backend": backend_of(arguments),
    }
    if hasattr(arguments, "explainer"):
        options["explainer"] = _explainer(arguments.explainer, arguments.candidates)
    return options


def _with_embedder(names: list[str], arguments: argparse.Namespace) -> list[str | BaseScorer]:
    """The scorers, "embedding" with the embedder that was named."""
    from neuron_lens.explain.scorers import Embedding, EmbeddingEndpoint, embedder_named

    if (arguments.embedder is None) == (Embedding.name in names):
        raise RequestError(
            "the scorer embedding needs an embedder: --embedder local:FOLDER or openai:MODEL@URL"
            if arguments.embedder is None
            else "--embedder goes with the scorer embedding: --scorers embedding"
        )
    if arguments.embedder is None:
        return [*names]
    embedder = embedder_named(arguments.embedder)
    limited = arguments.budget is not None or arguments.max_calls is not None
    if limited and isinstance(embedder, EmbeddingEndpoint):
        raise RequestError(
            "--budget and --max-calls count what a judge is asked, not what an embeddings endpoint is: leave them out, or "
            "give a local embedder"
        )
    return [Embedding(embedder=embedder) if name == Embedding.name else name for name in names]


def asked(pipeline: Pipeline, units: Sequence[Unit], arguments: argparse.Namespace) -> RunResult | int:
    """The run, or the exit code of one that was only rehearsed, or that the budget stopped."""
    from neuron_lens.llm import BudgetExceeded

    if arguments.dry_run:
        print(f"{len(units)} units: {pipeline.estimate(units, price_of(arguments.price))}")
        return 0
    try:
        return pipeline.run(units)
    except BudgetExceeded as error:
        return stopped_by(error)


def stopped_by(error: BudgetExceeded) -> int:
    """Say so, and give the exit code."""
    print(
        f"neuron-lens: stopped by the budget, nothing is lost: {error}. Give the same command again with a higher "
        f"--budget or --max-calls, and it goes on from here",
        file=sys.stderr,
    )
    return STOPPED


def _explainer(name: str, candidates: int) -> Explainer:
    from neuron_lens.explain.explainers import JudgeExplainer, explainer_named

    kind = explainer_named(name)
    if issubclass(kind, JudgeExplainer):
        return kind(n_candidates=candidates)
    if candidates != 1:
        raise RequestError(
            f"{name} gives one explanation; --candidates goes with an explainer that asks a judge"
        )
    return kind()


def price_of(text: str | None) -> Price | None:
    """The two numbers of --price."""
    from neuron_lens.llm import Price

    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--price {text!r}: expected two numbers, such as 0.15,0.60") from None
    return Price(prompt=read, completion=written)


def _budget(arguments: argparse.Namespace) -> Budget | None:
    from neuron_lens.llm import Budget

    if arguments.budget is None and arguments.max_calls is None:
        return None
    price = price_of(arguments.price)
    if arguments.budget is not None and price is None:
        raise RequestError(
            "--budget is in money: say what tokens cost with --price IN,OUT, or use --max-calls"
        )
    return Budget(max_cost=arguments.budget, max_calls=arguments.max_calls, price=price)


def _capabilities(text: str | None) -> Capabilities | None:
    from neuron_lens.llm import Capabilities

    return None if text is None else Capabilities.of(filter(None, map(str.strip, text.split(","))))


def backend_of(arguments: argparse.Namespace) -> Backend | None:
    """The judge that was named, or None."""
    if arguments.judge is None:
        return None
    from neuron_lens.llm import LocalBackend, OpenAIBackend, ScriptedBackend

    kind, _, who = arguments.judge.partition(":")
    if arguments.capabilities is not None and kind != "openai":
        raise RequestError("--capabilities goes with --judge openai:…; other judges know what they can do")
    budget = _budget(arguments)
    if kind == "openai" and who:
        name, _, url = who.partition("@")
        return OpenAIBackend(
            name, base_url=url or None, capabilities=_capabilities(arguments.capabilities),
            concurrency=arguments.concurrency, budget=budget,
        )  # fmt: skip
    if kind == "local" and who:
        from neuron_lens.transformer import Transformer

        path, dtype = (who, "") if Path(who).exists() else who.partition("@")[::2]
        judge = Transformer.load(path, dtype=dtype or None).eval()
        return LocalBackend(judge, name=Path(path).name, budget=budget)
    if kind == "scripted" and who.count(":") == 1:
        module, function = who.split(":")
        try:
            script = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise BackendError(f"--judge {arguments.judge}: there is no such function ({error})") from None
        return ScriptedBackend(script, name=who, concurrency=arguments.concurrency, budget=budget)
    raise RequestError(
        f"--judge {arguments.judge!r}: expected openai:MODEL, openai:MODEL@URL, local:NAME_OR_PATH or "
        "scripted:MODULE:FUNCTION"
    )
