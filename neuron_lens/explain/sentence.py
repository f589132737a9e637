"""A fitted predicate in one readable sentence, with the strengths graded against the unit's own range."""

from __future__ import annotations

from neuron_lens.explain.result import Predicate, Table, TableEntry

__all__ = ["describe"]

_SHOWN = 5  # values a sentence lists for its first rule
_SHOWN_LATER = 3
_WEAK_FIT = 0.1  # validation correlation below which no rule is claimed

# What an effect is called, by its share of the largest activation on the training windows.
_LEAST_SHARES = (0.5, 0.2, 0.0)
_GRADES = {
    "fires": ("strongly", "moderately", "weakly"),  # the first rule says when the unit fires,
    "is held down": ("strongly", "moderately", "weakly"),
    "more": ("much more", "more", "a little more"),  # the later ones what changes that
    "less": ("much less", "less", "a little less"),
}

# How a rule's values are introduced, where "where <title> is" would be clumsy.
_PHRASES = {
    "token": "on the token {}",
    "word": "on the word {} (up to here)",
    "token_pair": "at the end of {}",
    "token_triple": "at the end of {}",
    "previous_token": "after {}",
    "second_previous_token": "two tokens after {}",
    "third_previous_token": "three tokens after {}",
    "next_token": "just before {}",
    "token_shape": "on tokens of {}",
    "lexical_class": "on a token of class {}",
    "next_lexical_class": "on {}",
    "previous_lexical_class": "at {}",
    "lexical_triple": "at {}",
    "statement": "on {}",
    "bracket": "on {}",
    "token_in_statement": "on {}",
    "token_in_class": "on {}",
    "token_in_bracket": "on {}",
    "previous_class_token": "at {}",
    "previous_token_class": "at {}",
    "place_in_line": "{}",
    "context_position": "{} tokens into the text",
    "repeated": "on {}",
    "continuation": "where the token was followed by {} the last time",
    "promoted_next": "where the next token is {} by its own output",
    "promoted_here": "where the token itself is {} by its own output",
    "promoted_continuation": "where what followed last time is {} by its own output",
}


def describe(predicate: Predicate, largest: float, validation_correlation: float) -> str:
    """One sentence for a predicate; `largest` is the unit's largest activation on the training windows."""
    if not predicate.tables or not any(table.entries for table in predicate.tables):
        return "No readable rule: none of the features tried predicts this unit's activation."
    clauses = [_clause(table, largest, first=place == 0) for place, table in enumerate(predicate.tables)]
    sentence = "; ".join(clause for clause in clauses if clause)
    if validation_correlation < _WEAK_FIT:
        return f"No rule to rely on; the best guess is that it {_lower(sentence)}."
    return sentence + "."


def _clause(table: Table, largest: float, first: bool) -> str:
    """One rule: what raises the activation, and what lowers it when that weighs more."""
    raising = [entry for entry in table.entries if entry.value > 0]
    lowering = [entry for entry in table.entries if entry.value < 0]
    shown = _SHOWN if first else _SHOWN_LATER
    weight_up, weight_down = _weight(raising), _weight(lowering)
    said = []
    if raising and weight_up >= 0.25 * weight_down:
        verb = "fires" if first else "more"
        said.append(("fires " if first else "") + _listed(table, raising, largest, shown, _GRADES[verb]))
    if lowering and (weight_down > weight_up or not said):
        verb = "is held down" if first else "less"
        said.append(
            ("is held down " if first else "") + _listed(table, lowering, largest, shown, _GRADES[verb])
        )
    text = " and ".join(said)
    return text[:1].upper() + text[1:] if first else text


def _listed(
    table: Table, entries: list[TableEntry], largest: float, count: int, grades: tuple[str, ...]
) -> str:
    """The weightiest values, strongest first, each grade named once."""
    shown = sorted(entries[:count], key=lambda entry: -abs(entry.value))
    groups: dict[str, list[str]] = {}
    for entry in shown:
        groups.setdefault(_grade(abs(entry.value), largest, grades), []).append(entry.key)
    phrase = _PHRASES.get(table.feature, f"where {table.title} is {{}}")
    parts = [f"{grade} {phrase.format(_either(keys))}".strip() for grade, keys in groups.items()]
    rest = len(entries) - len(shown)
    return ", ".join(parts) + (f" (and on {rest} more)" if rest else "")


def _grade(value: float, largest: float, grades: tuple[str, ...]) -> str:
    share = value / largest if largest > 0 else 0.0
    return next(name for least, name in zip(_LEAST_SHARES, grades, strict=True) if share >= least)


def _either(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " or " + keys[-1]


def _weight(entries: list[TableEntry]) -> float:
    return sum(entry.n * entry.value**2 for entry in entries)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
