"""What a unit does to the prediction of the next token, and the rules its explanation sums up."""

from __future__ import annotations

from neuron_lens.explain.result import AblationEffect, CausalEffect, Predicate, Table, UnitResult
from neuron_lens.report.charts import Estimate, interval_svg
from neuron_lens.report.html import Html, element, fragment
from neuron_lens.report.tables import TOKENS_SHOWN, bar_rows, fact_list, table, token_table
from neuron_lens.report.words import decimals, number, percent

__all__ = ["effect_section", "rules_section", "weight_tokens_section"]


def weight_tokens_section(result: UnitResult) -> Html | None:
    """The tokens that the unit's output weights promote and suppress, and those its input weights read."""
    tables, notes = [], []
    if result.promoted or result.suppressed:
        tables.append(token_table("Promoted", "logit", result.promoted))
        tables.append(token_table("Suppressed", "logit", result.suppressed))
        notes.append("Promoted and suppressed: next tokens, its output weights through the unembedding.")
    if result.reads:
        tables.append(token_table("Read", "drive", result.reads))
        notes.append("Read: tokens whose embedding alone drives it most, by its input weights.")
    if not tables:
        return None
    return fragment(
        element("h2", "Tokens its weights speak for"),
        element("p", " ".join([*notes, "From weights alone, no text."]), class_="note"),
        element("div", tables, class_="columns"),
    )


def effect_section(causal: CausalEffect | None) -> Html:
    """The causal figure: loss and next tokens with the unit replaced, where it fires and where not."""
    heading = element("h2", "What changes without it")
    if causal is None:
        return fragment(heading, element("p", "Not measured in this run.", class_="note"))
    sides = (
        ("Where it fires", causal.where_firing, "main"),
        ("Where it is silent", causal.where_silent, "control"),
    )
    estimates = [
        Estimate(title, effect.loss_change.value, effect.loss_change.low, effect.loss_change.high, kind)
        for title, effect, kind in sides
    ]
    title = "Change in loss when the unit is replaced, with 95 % intervals"
    # The axis fits the intervals; it only has to include "no change".
    chart = interval_svg(estimates, title=title, low=0.0, high=1e-4, reference=0.0, digits=4)
    by = "zero" if causal.replaced_by == "zero" else f"its mean, {number(causal.value)}"
    words = f"The activation is replaced by {by}. Change in the loss of the next token, in nats:"
    return fragment(
        heading,
        element("p", words),
        element("figure", chart),
        element("div", [_ablation(title, effect) for title, effect, _ in sides], class_="columns"),
    )


def _ablation(title: str, effect: AblationEffect) -> Html:
    facts = [
        ("positions", f"{effect.n_positions:,}"),
        (
            "loss, intact → replaced",
            f"{decimals(effect.loss_intact, 4)} → {decimals(effect.loss_ablated, 4)}",
        ),
        ("KL divergence", f"{number(effect.divergence)} nats"),
    ]
    return element(
        "div",
        element("h3", title),
        fact_list(facts),
        token_table("Became likelier", "Δ log-prob.", effect.raised),
        token_table("Became less likely", "Δ log-prob.", effect.lowered),
    )


def rules_section(predicate: Predicate | None) -> Html | None:
    """The predicate that was simulated and scored, one table a rule."""
    if predicate is None:
        return None
    words = (
        f"Predicted activation: {number(predicate.base)}, plus these effects, no lower than "
        f"{number(predicate.floor)}. The sentence at the top sums them up; this is what was simulated "
        "and scored."
    )
    rules = [_rule(rule) for rule in predicate.tables]
    return fragment(
        element("h2", "The rules behind the sentence"),
        element("p", words),
        element("div", rules, class_="columns"),
    )


def _rule(rule: Table) -> Html:
    entries = sorted(rule.entries, key=lambda entry: -abs(entry.value))
    cells = bar_rows([(entry.key, entry.value) for entry in entries])
    rows = [[*row, f"{entry.n:,}"] for row, entry in zip(cells, entries, strict=False)]
    more = f"; {TOKENS_SHOWN} of {len(entries)} values shown" if len(entries) > TOKENS_SHOWN else ""
    note = f"explains {percent(rule.share)} of the training variance{more}"
    return element(
        "div",
        element("h3", f"By {rule.title}"),
        element("p", note, class_="note"),
        table(["Value", "effect", "", "tokens"], rows, figures=frozenset({1, 3})),
    )
