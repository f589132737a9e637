"""The page of one unit: what it is taken to do, how far that is true, and where to see it.

In reading order: the sentence and key figures; scores beside their controls; windows of text; how the
activation is distributed; the tokens the unit's weights speak for; what replacing it changes; the rules
behind the sentence; statistics and the facts of the run. What was not measured is said to be so, never drawn
as zero.
"""

from __future__ import annotations

from collections.abc import Collection

from neuron_lens.explain.result import Control, Score, UnitResult
from neuron_lens.report.charts import Estimate, histogram_svg, interval_svg
from neuron_lens.report.effects import effect_section, rules_section, weight_tokens_section
from neuron_lens.report.html import Child, Html, element, fragment
from neuron_lens.report.judged import (
    asked_a_judge,
    baseline_section,
    candidates_section,
    judged_section,
    similar_section,
)
from neuron_lens.report.tables import fact_list, table
from neuron_lens.report.windows import windows_section
from neuron_lens.report.words import (
    control_words,
    decimals,
    number,
    percent,
    score_interval,
    score_words,
    sentence_html,
    signed,
)

__all__ = ["unit_body"]


def unit_body(result: UnitResult, *, index_href: str | None, linked: Collection[str] = ()) -> Html:
    """The page's body; `index_href` is where the list of units is, None for a page that stands alone; `linked` are the
    names of units with pages to link to."""
    unit = result.unit
    heading = f"{unit.kind.capitalize()} {unit.index} of layer {unit.layer}"
    crumbs: list[Child] = [element("a", "All units", href=index_href), " · "] if index_href else []
    crumbs += [f"model {result.model.name}, site ", element("code", unit.site)]
    if unit.dictionary:
        crumbs += [", direction " if unit.kind == "direction" else ", of ", element("code", unit.dictionary)]
    sections = [
        ("scores", "Scores", _scores(result) if result.scores else None),
        ("judged", "Judge" if asked_a_judge(result) else "Further scores", judged_section(result)),
        ("candidates", "Candidates", candidates_section(result.explanation)),
        ("windows", "Text", windows_section(result)),
        ("activations", "Activations", _activations(result)),
        ("tokens", "Tokens", weight_tokens_section(result)),
        ("effect", "Effect", effect_section(result.causal)),
        ("similar", "Similar units", similar_section(result, linked)),
        ("baseline", "Baseline", baseline_section(result)),
        ("rules", "Rules", rules_section(result.explanation.predicate)),
        ("facts", "Facts", _facts(result)),
    ]
    links = [element("a", word, href=f"#{name}") for name, word, content in sections if content]
    return fragment(
        element(
            "header",
            element("p", crumbs, class_="crumbs"),
            element("h1", heading),
            element("p", sentence_html(result.explanation.sentence), class_="sentence"),
            _cards(result),
            element("nav", links, class_="sections", aria_label="Sections"),
        ),
        element("main", [element("section", content, id=name) for name, _, content in sections if content]),
        element("div", id="readout", role="status", aria_live="polite"),
    )


def _cards(result: UnitResult) -> Html:
    cards: list[tuple[str, str, str]] = []
    for name in ("correlation", "detection_auc"):
        score = result.scores.get(name)
        if score is not None:
            cards.append((score_words(name)[0], decimals(score.value), score_interval(score)))
    for one in result.judged:
        cards.append(
            (one.scorer.replace("_", " ").capitalize(), decimals(one.score.value), score_interval(one.score))
        )
    statistics = result.statistics
    threshold = f"of {statistics.n_tokens:,} tokens, above {number(statistics.firing_threshold)}"
    cards.append(("Fires on", percent(statistics.density), threshold))
    cards.append(("Strongest activation", number(statistics.maximum), f"mean {number(statistics.mean)}"))
    if result.causal is not None:
        change = result.causal.where_firing.loss_change
        cards.append(("Loss change without it", signed(change.value), "nats per token, where it fires"))
    rows = [
        element("div", element("dt", label), element("dd", value, element("small", note)))
        for label, value, note in cards
    ]
    return element("dl", rows, class_="cards")


def _scores(result: UnitResult) -> Html:
    note = (
        "How well the explanation predicts the activation at each token of windows it was not made from. "
        "Lines are bootstrap 95 % intervals over windows; the dashed line is what knowing nothing gives."
    )
    splits = result.splits
    parts = (
        f"{splits.train:,} windows for training, {splits.validation:,} for choosing, {splits.test:,} for "
        "these scores; no window is in two parts."
    )
    controls = [_control(control) for control in result.controls]
    return fragment(
        element("h2", "Scores on held-out windows, beside their controls"),
        element("p", note, class_="note"),
        element("div", _score_charts(result)),
        element("ul", controls, class_="note") if controls else None,
        element("p", parts, class_="note"),
        element("details", element("summary", "All figures as a table"), _score_table(result)),
    )


def _score_charts(result: UnitResult) -> list[Html]:
    """One drawing for the scores that share a null value."""
    families: dict[float, list[str]] = {}
    for name in result.scores:
        families.setdefault(score_words(name)[1], []).append(name)
    figures = []
    for reference, names in families.items():
        estimates: list[Estimate] = []
        for name in names:
            estimates.append(Estimate(score_words(name)[0], kind="group"))
            estimates.append(_estimate("this explanation", result.scores[name], "main"))
            for control in result.controls:
                estimates.append(_estimate(control_words(control.name), control.scores.get(name), "control"))
        title = "Scores with 95 % intervals: " + ", ".join(score_words(name)[0] for name in names)
        figures.append(element("figure", interval_svg(estimates, title=title, reference=reference)))
    return figures


def _control(control: Control) -> Html:
    used = None
    if control.sentence is not None:
        used = [" Its explanation: ", element("q", sentence_html(control.sentence))]
    description = control.description.rstrip(".") + "."
    return element("li", element("strong", control_words(control.name)), f": {description}", used)


def _score_table(result: UnitResult) -> Html:
    predictions = [("this explanation", result.scores)]
    predictions += [(control_words(control.name), control.scores) for control in result.controls]
    rows: list[list[Child]] = []
    for name in result.scores:
        for label, scores in predictions:
            score = scores.get(name)
            if score is not None:
                figures = [decimals(score.value, 3), score_interval(score), f"{score.n:,}"]
                rows.append(
                    [score_words(name)[0], label, *figures, f"{score.n_windows:,}", percent(score.coverage)]
                )
    heads = ["Score", "Prediction", "Value", "95 % interval", "Tokens", "Windows", "Coverage"]
    return table(heads, rows, figures=frozenset(range(2, 7)))


def _activations(result: UnitResult) -> Html:
    statistics = result.statistics
    histogram = statistics.histogram
    density = percent(statistics.density)
    heading = element("h2", "Activations over the whole corpus")
    threshold = number(statistics.firing_threshold)
    words = f"Above {threshold}, where it counts as firing, on {density} of {statistics.n_tokens:,} tokens."
    if not histogram.counts:
        return fragment(heading, element("p", words), element("p", "No histogram was recorded."))
    if histogram.edges[0] == histogram.edges[-1]:
        return fragment(heading, element("p", words), element("p", "It is the same at every token."))
    chart = histogram_svg(
        histogram.edges,
        histogram.counts,
        title=f"Activations of {result.unit}; density {density}",
        x_label="activation",
        log_counts=True,
        marker=(statistics.firing_threshold, f"fires: {density}"),
        width=760,
    )
    return fragment(heading, element("p", words), element("figure", chart))


def _facts(result: UnitResult) -> Html:
    statistics, model, run = result.statistics, result.model, result.run
    about_unit = [
        ("mean", number(statistics.mean)),
        ("variance", number(statistics.variance)),
        ("skewness", number(statistics.skewness)),
        ("kurtosis", number(statistics.kurtosis)),
        ("range", f"{number(statistics.minimum)} to {number(statistics.maximum)}"),
        ("fires above", number(statistics.firing_threshold)),
        ("density", percent(statistics.density)),
    ]
    about_run = [
        ("model", f"{model.name}: {model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}"),
        ("model fingerprint", model.fingerprint),
        ("corpus", f"{run.corpus}: {run.n_documents:,} documents, {run.n_tokens:,} tokens"),
        ("corpus fingerprint", run.corpus_fingerprint),
        ("documents not lexed", f"{run.n_unlexed_documents:,}"),
        ("window, row", f"{run.window_length} tokens, {run.row_length} tokens"),
        ("explainer", result.explanation.explainer),
        ("judge", result.explanation.backend or "none"),
        ("prompt", result.explanation.prompt or "none"),
        ("seed", str(run.seed)),
        ("neuron_lens", run.package_version),
    ]
    return fragment(
        element("h2", "Statistics and facts of the run"),
        element("div", fact_list(about_unit), fact_list(about_run), class_="columns"),
    )


def _estimate(label: str, score: Score | None, kind: str) -> Estimate:
    if score is None:
        return Estimate(label, kind=kind)
    return Estimate(label, score.value, score.low, score.high, kind)
