"""The keepers against what keeping everything gives, in any order, cut in two and merged, saved and loaded."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from neuron_lens.harvest.corpus import Row
from neuron_lens.harvest.cutter import Cutter
from neuron_lens.harvest.keepers import TopWindows, UniformSample, WindowBatch, fired_scores
from neuron_lens.harvest.sparse_sample import SparseSample
from neuron_lens.harvest.statistics import BIN_EDGES, LogHistogram, Moments

N_WINDOWS, LENGTH, N_UNITS = 40, 6, 5
CPU = torch.device("cpu")


def _select(batch: WindowBatch, windows: torch.Tensor) -> WindowBatch:
    partners = None if batch.partners is None else batch.partners[windows]
    return WindowBatch(
        batch.activations[windows],
        batch.mask[windows],
        batch.place[windows],
        batch.priority[windows],
        partners,
    )


def _largest(batch: WindowBatch) -> torch.Tensor:
    return torch.stack([tokens.amax(0) for tokens in batch.tokens()])


@pytest.fixture(params=["distinct", "ties", "sparse"])
def stream(request: pytest.FixtureRequest) -> WindowBatch:
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(N_WINDOWS, LENGTH, N_UNITS, generator=generator) * 3 + 50
    if request.param == "ties":
        activations = activations.div(4).round()
    elif request.param == "sparse":
        activations = (activations - 53).clamp(min=0)
    mask = torch.ones(N_WINDOWS, LENGTH, dtype=torch.bool)
    mask[7, 3:] = False
    activations[~mask] = 0
    priority = torch.randperm(N_WINDOWS, generator=generator) << 55
    partners = torch.randint(0, 9, activations.shape, generator=generator, dtype=torch.int16)
    partners[~mask] = 0
    return WindowBatch(activations, mask, torch.arange(N_WINDOWS) * 10, priority, partners)


def _batches(stream: WindowBatch, order: torch.Tensor, size: int) -> list[WindowBatch]:
    return [_select(stream, order[start : start + size]) for start in range(0, len(order), size)]


ORDERS = [
    torch.arange(N_WINDOWS),
    torch.arange(N_WINDOWS).flip(0),
    torch.randperm(N_WINDOWS, generator=torch.Generator().manual_seed(1)),
]
in_any_order = pytest.mark.parametrize("order", ORDERS, ids=["forward", "backward", "shuffled"])


@in_any_order
@pytest.mark.parametrize("size", [1, 7, N_WINDOWS])
def test_moments_equal_those_of_all_tokens(stream: WindowBatch, order: torch.Tensor, size: int) -> None:
    moments, other = Moments(), Moments()
    for place, batch in enumerate(_batches(stream, order, size)):
        for window in batch.tokens():
            (moments if place % 2 else other).update(window)
    moments.merge(other)
    values = stream.activations[stream.mask].double()
    centred = values - values.mean(0)
    expected = torch.stack([values.mean(0), *((centred**power).mean(0) for power in (2, 3, 4))])
    torch.testing.assert_close(moments.central(), expected, rtol=1e-4, atol=1e-3)
    assert moments.n == len(values)
    assert torch.equal(moments.low, stream.activations[stream.mask].amin(0))
    assert torch.equal(moments.high, stream.activations[stream.mask].amax(0))


def test_the_histogram_counts_every_token_in_its_bin() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4000, 3, generator=generator) * torch.tensor([1e-3, 1.0, 900.0])
    values[:2] = torch.tensor([[0.0, -0.0, 1.0], [2.0**-10, 2.0**10, 1.25]])
    histogram, other = LogHistogram(3, CPU), LogHistogram(3, CPU)
    histogram.update(histogram.bins(values[:1000]))
    other.update(other.bins(values[1000:]))
    histogram.merge(other)
    edges = np.concatenate([[-np.inf], BIN_EDGES, [np.inf]])
    for unit in range(3):
        column = values[:, unit].double().numpy()
        expected = [((low <= column) & (column < high)).sum() for low, high in pairwise(edges)]
        assert histogram.counts[unit].tolist() == expected


def _top(count: int) -> TopWindows:
    return TopWindows(count, N_UNITS, LENGTH, CPU, has_partners=True)


@in_any_order
@pytest.mark.parametrize("count", [1, 8, N_WINDOWS + 3])
@pytest.mark.parametrize("halves", [1, 2], ids=["one", "merged"])
def test_top_windows_equal_sorting_all(
    stream: WindowBatch, order: torch.Tensor, count: int, halves: int
) -> None:
    tops = [_top(count) for _ in range(halves)]
    for place, batch in enumerate(_batches(stream, order, 7)):
        tops[place % halves].update(batch, _largest(batch))
    loaded = _top(count)
    loaded.load({name: held.clone() for name, held in tops[-1].state().items()})
    if halves == 2:
        loaded.merge(tops[0])
    top = loaded.sorted()
    largest = stream.activations.masked_fill(~stream.mask[:, :, None], -torch.inf).amax(1)
    scores, windows = largest.sort(dim=0, descending=True, stable=True)
    held = min(count, N_WINDOWS)
    assert torch.equal(top.score[:held], scores[:held])
    assert torch.equal(top.place[:held], windows[:held] * 10)
    assert (top.place[held:] == -1).all()
    assert stream.partners is not None and top.partners is not None
    for unit in range(N_UNITS):
        chosen = windows[:held, unit]
        assert torch.equal(top.activations[:held, unit], stream.activations[chosen, :, unit].half())
        assert torch.equal(top.partners[:held, unit], stream.partners[chosen, :, unit])


@in_any_order
def test_fired_windows_are_a_sample_of_those_above_zero(stream: WindowBatch, order: torch.Tensor) -> None:
    fired = _top(6)
    for batch in _batches(stream, order, 7):
        fired.update(batch, fired_scores(batch, _largest(batch)))
    held = fired.sorted()
    for unit in range(N_UNITS):
        firing = (stream.activations[:, :, unit].amax(1) > 0).nonzero()[:, 0]
        expected = firing[stream.priority[firing].argsort()][:6] * 10
        places = held.place[:, unit]
        assert places[places >= 0].tolist() == expected.tolist()


def _sample(kind: str, count: int) -> Any:
    if kind == "sparse":
        return SparseSample(count, CPU)
    return UniformSample(count, N_UNITS, LENGTH, CPU, has_partners=True)


def _dense(sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(sample, UniformSample):
        places, activations, partners = sample.sorted()
        assert partners is not None and partners.shape == activations.shape
        return places, activations
    places, entries = sample.by_place()
    dense = torch.zeros(len(places), LENGTH, N_UNITS, dtype=torch.float16)
    for window, (unit, position, value) in enumerate(entries):
        dense[window, position.long(), unit.long()] = value
    return places, dense


@in_any_order
@pytest.mark.parametrize("count", [1, 8, N_WINDOWS + 3])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("halves", [1, 2], ids=["one", "merged"])
def test_the_sample_depends_on_priorities_alone(
    stream: WindowBatch, order: torch.Tensor, count: int, kind: str, halves: int
) -> None:
    samples = [_sample(kind, count) for _ in range(halves)]
    for place, batch in enumerate(_batches(stream, order, 7)):
        samples[place % halves].update(batch)
    loaded = _sample(kind, count)
    loaded.load({name: held.clone() for name, held in samples[-1].state().items()})
    if halves == 2:
        loaded.merge(samples[0])
    places, activations = _dense(loaded)
    expected = stream.priority.argsort()[:count].sort().values
    assert torch.equal(places, expected * 10)
    assert torch.equal(activations, stream.activations[expected].half())


def test_a_sample_takes_only_the_windows_named(stream: WindowBatch) -> None:
    for kind in ("dense", "sparse"):
        sample = _sample(kind, 5)
        sample.update(stream, torch.tensor([3, 9]))
        assert _dense(sample)[0].tolist() == [30, 90]


def test_windows_still_in_their_rows_are_those_that_were_cut() -> None:
    """Rows of 10 positions, the windows of 4 at 2 and 6; the last row ends after 7."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(document, 0, 2, np.zeros(size, dtype=np.int32), 0) for document, size in enumerate((10, 10, 7))
    ]
    cutter = Cutter(rows, 4, 0, 0)
    x = torch.randn(3, 10, 5, generator=generator)
    shared = (cutter.mask, cutter.place, cutter.priority)
    inside = WindowBatch(x, *shared, where=cutter.where)
    cut = WindowBatch(cutter(x), *shared)
    assert cutter.mask.sum(1).tolist() == [4, 4, 4, 4, 4, 1]
    for one, other in zip(inside.tokens(), cut.tokens(), strict=True):
        assert torch.equal(one, other)
    windows, units = torch.tensor([5, 0, 3]), torch.tensor([1, 4, 2])
    assert torch.equal(inside.whole(windows, inside.activations), cut.activations[windows])
    assert torch.equal(inside.pick(windows, units, x), cut.activations[windows, :, units])
    assert torch.equal(cut.activations[0], x[0, 2:6]) and torch.equal(cut.activations[5, 0], x[2, 6])
    assert (cut.activations[5, 1:] == 0).all()
