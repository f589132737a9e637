"""The keepers against what keeping everything gives."""

from __future__ import annotations

import pytest
import torch

from neuron_lens.harvest.keepers import Moments, TopWindows, UniformSample, WindowBatch

N_WINDOWS, LENGTH, N_UNITS = 40, 6, 5


@pytest.fixture
def stream() -> WindowBatch:
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(N_WINDOWS, LENGTH, N_UNITS, generator=generator) * 3 + 50
    mask = torch.ones(N_WINDOWS, LENGTH, dtype=torch.bool)
    mask[7, 3:] = False
    priority = torch.randperm(N_WINDOWS, generator=generator)
    return WindowBatch(activations, mask, torch.arange(N_WINDOWS) * 10, priority)


def _batches(stream: WindowBatch, order: torch.Tensor, size: int) -> list[WindowBatch]:
    return [stream.select(order[start : start + size]) for start in range(0, N_WINDOWS, size)]


ORDERS = [torch.arange(N_WINDOWS), torch.arange(N_WINDOWS).flip(0), torch.randperm(N_WINDOWS)]


@pytest.mark.parametrize("order", ORDERS, ids=["forward", "backward", "shuffled"])
@pytest.mark.parametrize("size", [1, 7, N_WINDOWS])
def test_moments_equal_those_of_all_tokens(stream: WindowBatch, order: torch.Tensor, size: int) -> None:
    moments = Moments()
    for batch in _batches(stream, order, size):
        moments.update(batch)
    values = stream.activations[stream.mask].double()
    centred = values - values.mean(0)
    expected = torch.stack([values.mean(0), *((centred**power).mean(0) for power in (2, 3, 4))])
    torch.testing.assert_close(moments.central(), expected, rtol=1e-4, atol=1e-3)
    assert moments.n == len(values)
    assert torch.equal(moments.low, stream.activations[stream.mask].amin(0))
    assert torch.equal(moments.high, stream.activations[stream.mask].amax(0))


@pytest.mark.parametrize("order", ORDERS, ids=["forward", "backward", "shuffled"])
@pytest.mark.parametrize("count", [1, 8, N_WINDOWS + 3])
def test_top_windows_equal_sorting_all(stream: WindowBatch, order: torch.Tensor, count: int) -> None:
    top = TopWindows(count, N_UNITS, LENGTH, torch.device("cpu"))
    for batch in _batches(stream, order, 7):
        top.update(batch, batch.activations.amax(1))
    scores, windows = stream.activations.amax(1).sort(dim=0, descending=True)
    held = min(count, N_WINDOWS)
    assert torch.equal(top.score[:held], scores[:held])
    assert torch.equal(top.place[:held], windows[:held] * 10)
    assert (top.place[held:] == -1).all()
    for unit in range(N_UNITS):
        expected = stream.activations[windows[:held, unit], :, unit].half()
        assert torch.equal(top.activations[:held, unit], expected)


@pytest.mark.parametrize("order", ORDERS, ids=["forward", "backward", "shuffled"])
@pytest.mark.parametrize("count", [1, 8, N_WINDOWS + 3])
def test_the_sample_depends_on_priorities_alone(stream: WindowBatch, order: torch.Tensor, count: int) -> None:
    sample = UniformSample(count, N_UNITS, LENGTH, torch.device("cpu"))
    for batch in _batches(stream, order, 7):
        sample.update(batch)
    places, activations = sample.sorted()
    expected = stream.priority.argsort()[:count].sort().values
    assert torch.equal(places, expected * 10)
    assert torch.equal(activations, stream.activations[expected].half())
