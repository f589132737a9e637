"""Tokens and their activations -> highlighted text, the true activation above the simulated one.

Every token is one `<i>` of the window's text. Its background is shaded by the true activation; a strip under
it is shaded by the simulated one, on the same scale, so that agreement is seen at a glance. Whitespace stays
what it is (indentation and line breaks are kept) and is made visible besides: a newline shows ↵, a tab ⇥,
spaces show dots where the token is nothing but spaces. Shades are classes (`t1`..`t12`, `s1`..`s12`, with
`tn` and `sn` for negative values, `sx` for a missing prediction), so that a page carries no inline style.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from neuron_lens.errors import RequestError
from neuron_lens.report.html import Html, element, fragment
from neuron_lens.report.words import number

__all__ = ["SHADES", "legend", "token_spans", "visible_text"]

SHADES = 12

GLYPHS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def token_spans(
    tokens: Sequence[str],
    activations: Sequence[float],
    simulated: Sequence[float | None] | None = None,
    *,
    scale: float,
) -> Html:
    """One window as highlighted text.

    Args:
        tokens: the token texts `[pos]`; they may hold anything.
        activations: the true activations `[pos]`; NaN is shown as missing.
        simulated: the simulated activations `[pos]`, None where the simulation is missing; None for no strip.
        scale: the activation that gets the full shade, the same for all windows of a unit.

    Raises:
        RequestError: the lengths differ.
    """
    if len(activations) != len(tokens) or (simulated is not None and len(simulated) != len(tokens)):
        given = f"{len(tokens)} tokens, {len(activations)} activations"
        given += "" if simulated is None else f", {len(simulated)} simulated activations"
        raise RequestError(f"a window needs one activation for each token; given: {given}")
    strips: Sequence[float | None] = simulated if simulated is not None else [None] * len(tokens)
    spans = []
    for token, true, strip in zip(tokens, activations, strips, strict=True):
        classes = [_shade("t", true, scale), _shade("s", strip, scale)]
        classes.append("sx" if simulated is not None and _missing(strip) else None)
        classes.append("w" if token and not token.strip(" ") else None)
        title = number(true) if simulated is None else f"{number(true)}, simulated {number(strip)}"
        spans.append(element("i", _token(token), class_=" ".join(filter(None, classes)) or None, title=title))
    return fragment(spans)


def legend(scale: float, *, simulated: bool) -> Html:
    """What the shades mean: the ramp from zero to `scale`, and which band is which."""
    ramp = [element("i", "\u2002", class_=f"t{shade}") for shade in range(0, SHADES + 1, 2)]
    parts: list[Html] = [
        fragment(
            element("span", "0"),
            element("span", ramp, class_="ramp", aria_hidden="true"),
            f" {number(scale)}",
        )
    ]
    if simulated:
        sample = element("i", " text ", class_=f"t{SHADES - 3} s{SHADES // 2}")
        parts.append(
            fragment(element("span", sample, class_="tokens sample"), " shade: true; strip below: simulated")
        )
    return element("p", *[element("span", part, class_="key") for part in parts], class_="legend")


def visible_text(token: str) -> str:
    """The token on one line with every character visible: `↵` for a newline, `·` for a space, `⟨U+202E⟩` for
    characters that would vanish or reorder the text around them."""
    return "".join("·" if char == " " else GLYPHS.get(char) or _shown(char) for char in token)


def _token(token: str) -> Html:
    """The token's own text, with a glyph before each character that moves the pen without leaving a mark."""
    parts: list[Html | str] = []
    for char in token:
        if char in GLYPHS:
            parts.append(element("b", GLYPHS[char]))
            parts.append(char if char != "\r" else "")
        else:
            shown = _shown(char)
            parts.append(char if shown == char else element("b", shown))
    if not token:
        parts.append(element("b", "∅"))
    return fragment(parts)


def _shown(char: str) -> str:
    """`char` itself where it is seen and harmless, else its name in brackets."""
    if char == " " or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"):
        return char
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    return f"⟨U+{code:04X}⟩"


def _shade(band: str, value: float | None, scale: float) -> str | None:
    """The class that shades `band` for `value`: none where it is missing, or nearest to no shade."""
    if value is None or _missing(value) or scale <= 0:
        return None
    level = round(min(1.0, abs(value) / scale) * SHADES)
    if level == 0:
        return None
    return f"{band}n {band}{level}" if value < 0 else f"{band}{level}"


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
