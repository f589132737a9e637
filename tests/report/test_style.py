"""The style sheet: text stands out from what is behind it, light and dark (WCAG 2.1: contrast 4.5)."""

from __future__ import annotations

import re
from importlib import resources

import pytest

CSS = resources.files("neuron_lens.report").joinpath("style.css").read_text("utf-8")
LIGHT, DARK = [
    dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{([^}]*)\}", CSS)[:2]
]
FULL_SHADE = int(re.search(r"\.t12 \{ --t: (\d+)% \}", CSS)[1]) / 100


def channels(colour: str) -> list[float]:
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: list[float], b: list[float]) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("text", ["ink", "soft", "accent"])
@pytest.mark.parametrize("behind", ["paper", "panel"])
def test_text_stands_out(theme: dict[str, str], text: str, behind: str) -> None:
    assert contrast(channels(theme[text]), channels(theme[behind])) >= 4.5


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("hue", ["hot", "cold"])
def test_text_stands_out_from_the_strongest_shade(theme: dict[str, str], hue: str) -> None:
    mixed = [
        FULL_SHADE * a + (1 - FULL_SHADE) * b
        for a, b in zip(channels(theme[hue]), channels(theme["panel"]), strict=True)
    ]
    assert contrast(channels(theme["ink"]), mixed) >= 4.5


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("drawn", ["bar", "control"])
def test_drawings_stand_out(theme: dict[str, str], drawn: str) -> None:
    assert contrast(channels(theme[drawn]), channels(theme["paper"])) >= 2.2


def test_every_shade_has_its_rule_and_grows() -> None:
    for band, count in (("t", 12), ("s", 12), ("b", 20)):
        levels = [
            int(re.search(rf"\.{band}{n} \{{ --{band}: (\d+)% \}}", CSS)[1]) for n in range(1, count + 1)
        ]
        assert levels == sorted(set(levels))
