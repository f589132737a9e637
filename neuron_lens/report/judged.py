"""What scorers say of an explanation, each beside its controls; the candidates; the baseline; similar units."""

from __future__ import annotations

from collections.abc import Collection

from neuron_lens.explain.result import Explanation, Score, ScorerResult, UnitResult
from neuron_lens.records import Unit
from neuron_lens.report.charts import Estimate, interval_svg
from neuron_lens.report.html import Child, Html, element, fragment
from neuron_lens.report.tables import table
from neuron_lens.report.words import (
    control_words,
    decimals,
    figure,
    number,
    percent,
    score_interval,
    score_words,
    sentence_html,
)

__all__ = ["asked_a_judge", "baseline_section", "candidates_section", "judged_section", "similar_section"]


def asked_a_judge(result: UnitResult) -> bool:
    """Whether any score comes from a judge."""
    return any(one.backend for one in result.judged)


def judged_section(result: UnitResult) -> Html | None:
    """The scorers, one after the other; what does not apply is said to."""
    if not result.judged and not result.unscored:
        return None
    note = (
        "A judge answers questions about windows it was not shown before, going by the sentence alone. Beside it: the "
        "same questions with an explanation that should not work, and the answers dealt to other windows. The dashed "
        "line is chance; failed answers are missing, not wrong."
    )
    if not asked_a_judge(result):
        note = (
            "No judge was asked. Beside each figure: the same for an explanation that should not work, and for the "
            "predictions dealt to other places. The dashed line is chance."
        )
    refused = [element("li", element("strong", name), f": {why}") for name, why in result.unscored.items()]
    return fragment(
        element("h2", "Scores by a judge" if asked_a_judge(result) else "Further scores"),
        element("p", note, class_="note"),
        [_scorer(one) for one in result.judged],
        fragment(element("h3", "Not applicable"), element("ul", refused)) if refused else None,
    )


def _scorer(result: ScorerResult) -> Html:
    title = result.scorer.replace("_", " ").capitalize()
    headline = score_words(result.headline)[0]
    estimates = [_estimate("this explanation", result.score, "main")]
    estimates += [
        _estimate(control_words(control.name), control.scores.get(result.headline), "control")
        for control in result.controls
    ]
    about = [f"{result.calls} calls to {result.backend}" if result.backend else "no calls"]
    about += [f"{count} {kind}" for kind, count in result.missing.items()]
    about += [text for text in (result.method, result.prompt) if text]
    about.append(f"coverage {percent(result.score.coverage)}")
    chart = interval_svg(
        estimates, title=f"{title}: {headline}, with 95 % intervals", reference=result.chance
    )
    return fragment(
        element("h3", f"{title}: {headline.lower()}"),
        element("figure", chart),
        element("p", " · ".join(about), class_="note"),
        [element("p", note, class_="note") for note in result.notes],
        [
            element("p", f"No {score_words(name)[0].lower()}: {why}.", class_="note")
            for name, why in result.absent.items()
        ],
        element(
            "details", element("summary", "All figures as a table"), _figures(result), _quantiles(result)
        ),
    )


def _figures(result: ScorerResult) -> Html:
    said: list[tuple[str, dict[str, Score]]] = [("this explanation", result.scores)]
    said += [(control_words(control.name), control.scores) for control in result.controls]
    rows: list[list[Child]] = []
    for name in result.scores:
        for label, scores in said:
            score = scores.get(name)
            if score is not None:
                figures = [figure(score.value, 3), score_interval(score), f"{score.n_windows:,}"]
                rows.append([score_words(name)[0], label, *figures, percent(score.coverage)])
    heads = ["Score", "Explanation", "Value", "95 % interval", "Windows", "Coverage"]
    return table(heads, rows, figures=frozenset(range(2, 6)))


def _quantiles(result: ScorerResult) -> Html | None:
    if not result.quantiles:
        return None
    rows: list[list[Child]] = [
        [f"{number(one.low)} to {number(one.high)}", decimals(one.score.value, 3), score_interval(one.score)]
        for one in result.quantiles
    ]
    heads = ["Windows that peak", score_words(result.headline)[0], "95 % interval"]
    return fragment(element("h4", "By strength"), table(heads, rows, figures=frozenset({1, 2})))


def candidates_section(explanation: Explanation) -> Html | None:
    """The sentences it was chosen from."""
    if not explanation.candidates:
        return None
    rows: list[list[Child]] = [
        [
            sentence_html(one.sentence) if one.sentence is not None else f"missing: {one.missing}",
            decimals(None if one.validation is None else one.validation.value, 3),
            "chosen" if one.chosen else "",
        ]
        for one in explanation.candidates
    ]
    note = f"Chosen by {explanation.chosen_by} on validation windows, and reported on others."
    heads = ["Candidate", "On validation", ""]
    return fragment(
        element("h2", "Candidates"),
        element("p", note, class_="note"),
        table(heads, rows, figures=frozenset({1})),
    )


def baseline_section(result: UnitResult) -> Html | None:
    """What token statistics say of the unit."""
    if result.baseline is None:
        return None
    rows: list[list[Child]] = [
        [score_words(name)[0], decimals(score.value, 3), score_interval(score)]
        for name, score in result.baseline.scores.items()
    ]
    return fragment(
        element("h2", "What token statistics say"),
        element("p", sentence_html(result.baseline.explanation.sentence)),
        table(["Score", "Value", "95 % interval"], rows, figures=frozenset({1, 2})),
    )


def similar_section(result: UnitResult, linked: Collection[str]) -> Html | None:
    """Units that are active at the same tokens; those `linked` by name have pages in folders beside this one's."""
    if not result.similar:
        return None
    rows: list[list[Child]] = [
        [
            _linked(one.unit, linked),
            decimals(one.pearson),
            decimals(one.jaccard),
            decimals(one.cosine),
        ]
        for one in result.similar
    ]
    note = "Of the same layer, by correlation over the sampled tokens; the cosine is that of what they write."
    return fragment(
        element("h2", "Units that are active with it"),
        element("p", note, class_="note"),
        table(
            ["Unit", "Correlation", "Tokens shared (Jaccard)", "Cosine"], rows, figures=frozenset({1, 2, 3})
        ),
    )


def _linked(unit: Unit, linked: Collection[str]) -> Child:
    words = f"{unit.kind} {unit.index}"
    return element("a", words, href=f"../{unit.name}/index.html") if unit.name in linked else words


def _estimate(label: str, score: Score | None, kind: str) -> Estimate:
    return (
        Estimate(label, kind=kind)
        if score is None
        else Estimate(label, score.value, score.low, score.high, kind)
    )
