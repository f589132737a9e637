"""Parts that cannot overlap, strata that are a partition, and densities counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import PARTS, Evidence, Part, strata_of
from neuron_lens.records import Histogram, TokenWindow, Unit, UnitStatistics


def window(document: int, start: int, activations: tuple[float, ...]) -> TokenWindow:
    return TokenWindow(
        document=f"document {document}", document_index=document, start=start, character_start=start,
        context_position=start, tokens=tuple(f" t{i}" for i in range(len(activations))),
        ids=tuple(range(len(activations))), activations=activations,
    )  # fmt: skip


def statistics(threshold: float = 0.5) -> UnitStatistics:
    return UnitStatistics(
        n_tokens=10, mean=0.1, variance=1.0, skewness=None, kurtosis=None, minimum=0.0, maximum=1.0,
        firing_threshold=threshold, density=0.1, histogram=Histogram(edges=(0.0, 1.0), counts=(10,)),
    )  # fmt: skip


def evidence(**parts: Part) -> Evidence:
    return Evidence(
        unit=Unit(layer=0, index=0), statistics=statistics(), **{n: Part() for n in PARTS} | parts
    )


placed = st.tuples(st.integers(0, 1), st.integers(0, 12), st.integers(1, 4), st.integers(0, 2))


@given(st.lists(placed, max_size=8))
@settings(max_examples=200, deadline=None)
def test_evidence_exists_exactly_when_no_token_is_in_two_parts(
    places: list[tuple[int, int, int, int]],
) -> None:
    windows: dict[str, dict[tuple[int, int], TokenWindow]] = {name: {} for name in PARTS}
    tokens: dict[str, set[tuple[int, int]]] = {name: set() for name in PARTS}
    for document, start, length, part in places:
        name = PARTS[part]
        if (document, start) not in windows[name]:
            windows[name][document, start] = window(document, start, (0.0,) * length)
            tokens[name] |= {(document, start + i) for i in range(length)}
    shared = any(tokens[a] & tokens[b] for a in PARTS for b in PARTS if a < b)
    parts = {name: Part(random=tuple(found.values())) for name, found in windows.items()}
    if shared:
        with pytest.raises(RequestError, match="one part only"):
            evidence(**parts)
    else:
        made = evidence(**parts)
        assert Evidence.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize("one", ["top", "random", "near_misses"])
@pytest.mark.parametrize("other", ["top", "random", "near_misses"])
def test_every_list_of_a_part_is_watched(one: str, other: str) -> None:
    same = (window(0, 0, (1.0,)),)
    with pytest.raises(RequestError, match="one part only"):
        evidence(train=Part(**{one: same}), test=Part(**{other: same}))
    with pytest.raises(RequestError, match="one part only"):
        evidence(validation=Part(strata=strata_of(same, 0.5)), test=Part(**{other: same}))


@given(st.lists(st.floats(0, 2, width=16), min_size=1, max_size=4), st.sampled_from(PARTS))
def test_a_window_the_unit_fires_in_is_no_near_miss(activations: list[float], part: str) -> None:
    near = Part(near_misses=(window(0, 0, tuple(activations)),))
    threshold = evidence().firing_threshold
    if max(activations) > threshold:
        with pytest.raises(RequestError, match="is no near miss"):
            evidence(**{part: near})
    else:
        assert evidence(**{part: near}).part(part).near_misses == near.near_misses  # type: ignore[arg-type]


def test_one_window_cannot_have_two_activations() -> None:
    twice = Part(top=(window(0, 0, (1.0,)),), random=(window(0, 0, (0.0,)),))
    with pytest.raises(RequestError, match="differently"):
        evidence(train=twice)
    with pytest.raises(RequestError, match="no evidence"):
        evidence(train="nothing")  # type: ignore[arg-type]


def test_a_part_lists_every_window_once_and_density_counts_the_sample() -> None:
    loud, faint, quiet = window(0, 0, (0.0, 2.0)), window(0, 2, (0.6, 0.0)), window(0, 4, (0.0, 0.1))
    part = Part(
        top=(loud,), random=(quiet, loud, faint), near_misses=(quiet,), strata=strata_of((loud, faint), 0.5)
    )
    made = evidence(train=part, test=Part(top=(window(1, 0, (9.0, 9.0)),)))
    assert part.windows == (loud, faint, quiet)
    assert part.firing(0.5) == (loud, faint) and part.silent(0.5) == (quiet,)
    assert part.stratum_of == {faint.identity: 0, loud.identity: 1}
    assert made.density is not None
    assert (made.density.windows, made.density.tokens) == (2 / 3, made.statistics.density)
    assert (made.density.n_windows, made.density.firing_windows) == (3, 2)
    assert evidence(test=Part(top=(loud,))).density is None


def test_a_unit_too_rare_for_the_sample_has_its_density_from_its_tokens() -> None:
    loud = window(0, 0, (0.0, 2.0, 2.0, 0.0))  # fires at two tokens a window
    silent = tuple(window(0, 4 * i, (0.0,) * 4) for i in range(1, 9))
    made = evidence(train=Part(top=(loud,), random=silent)).density
    assert made is not None and made.firing_windows == 0
    assert made.windows == pytest.approx(0.1 * 4 / 2)  # statistics() says a tenth of the tokens
    assert evidence(train=Part(random=silent)).density.windows == 0.0  # type: ignore[union-attr]


@given(st.lists(st.floats(0, 10), max_size=30), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_strata_are_the_firing_windows_in_order_and_even(sizes: list[float], count: int) -> None:
    windows = tuple(window(0, 2 * i, (size, 0.0)) for i, size in enumerate(sizes))
    strata = strata_of(windows, 0.5, count)
    listed = [one.max_activation for stratum in strata for one in stratum.windows]
    assert listed == sorted(size for size in sizes if size > 0.5)
    lengths = [len(stratum.windows) for stratum in strata]
    assert not lengths or (max(lengths) - min(lengths) <= 1 and min(lengths) >= 1)
    assert all(stratum.low <= stratum.high for stratum in strata)


def test_sources_point_back_inside_the_window() -> None:
    plain = window(0, 0, (0.0, 1.0))
    fields = plain.model_dump()
    assert TokenWindow(**fields | {"sources": (-1, 0)}).sources == (-1, 0)
    for wrong in ((0,), (1, 0), (-2, 0)):
        with pytest.raises(ValueError, match="sources"):
            TokenWindow(**fields | {"sources": wrong})
