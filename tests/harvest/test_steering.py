"""Units steered to a divergence, what is written then, and how far a simulation of a unit carries the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from explain import planted

from neuron_lens.errors import RequestError
from neuron_lens.explain.scorers import Effect
from neuron_lens.explain.source_work import SourceWork
from neuron_lens.explain.unit import ExplainedUnit
from neuron_lens.harvest.ablation import WindowRun, divergences
from neuron_lens.harvest.effects import UnitEffects
from neuron_lens.harvest.run import harvest
from neuron_lens.harvest.sources import UnitSource
from neuron_lens.harvest.steering import Range, continued, steered_to, steering
from neuron_lens.transformer import Transformer
from neuron_lens.windows import ABSENT

from .test_sources import SETTINGS, _sources, model  # noqa: F401 - a fixture

KINDS = ["neuron", "head", "relu", "direction"]


@pytest.fixture(scope="module")
def works(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceWork]:  # noqa: F811
    sources = {kind: source for kind, source in _sources(model).items() if kind in KINDS}
    folder = tmp_path_factory.mktemp("steering")
    kept = harvest(model, planted.corpus(8, 200), [*sources.values()], folder, SETTINGS, progress=False)
    return {kind: SourceWork(source, kept[source.name]) for kind, source in sources.items()}


def _unit(work: SourceWork) -> tuple[UnitSource, ExplainedUnit]:
    """The unit of a source that reaches furthest."""
    index = int(work.harvest.indices[np.argmax(work.harvest.maxima)])
    return work.source, work.explained(index)


def _effects(work: SourceWork, **options: object) -> UnitEffects:
    return UnitEffects(work.source, work.harvest.windows, work.explained, n_windows=4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [0.02, 0.1])
def test_a_unit_is_steered_to_the_divergence_asked_for(
    works: dict[str, SourceWork], kind: str, target: float
) -> None:
    _, explained = _unit(works[kind])
    found = [one for one in _effects(works[kind], divergence=target)(explained.unit) if one.kind == "steer"]
    moved = [one.divergence for one in found if one.divergence is not None]
    assert len(moved) == len(found) == 4 and np.mean(moved) == pytest.approx(target, rel=0.05)
    assert len({one.strength for one in found}) == 1
    assert kind != "head" or (found[0].strength or 0.0) > 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_out_of_reach_comes_as_near_as_it_can(works: dict[str, SourceWork], kind: str) -> None:
    """Behind a norm a stream in one direction is as far as it goes: more strength does nothing more."""
    source, explained = _unit(works[kind])
    windows = works[kind].harvest.windows
    run = WindowRun(source.model, source.layer, windows, [0, 1], np.array([[3], [5]]))
    mask = np.arange(windows.length) == np.array([[3], [5]])
    where = run.spread(mask)
    span = Range(0.0, float(works[kind].harvest.maxima.max()))
    far = steered_to(source, explained.unit.index, run, where, span, 1e6)
    near = steered_to(source, explained.unit.index, run, where, span, 0.01)
    assert near.divergence.mean() < far.divergence.mean() < 1e6 and np.isfinite(far.divergence).all()


def test_a_head_scaled_by_one_is_intact_and_by_nothing_is_ablated(works: dict[str, SourceWork]) -> None:
    source = works["head"].source
    tokens = torch.arange(20).reshape(2, 10) + 100
    where = torch.zeros(2, 10, dtype=torch.bool)
    where[0, 4] = where[1, 7] = True

    def logits(hooks: object) -> torch.Tensor:
        with torch.no_grad():
            return source.model(tokens, hooks=hooks)  # type: ignore[arg-type]

    torch.testing.assert_close(logits(steering(source, 2, 1.0, where)), logits(None))
    torch.testing.assert_close(
        logits(steering(source, 2, 0.0, where)), logits(source.replacing(2, 0.0, where))
    )
    doubled = logits(steering(source, 2, 2.0, where)) - logits(None)
    assert (doubled[0, :4].abs() < 1e-5).all() and doubled[0, 4].abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_is_the_whole_text_run_with_the_unit_steered_from_the_prompts_end(
    works: dict[str, SourceWork], kind: str
) -> None:
    source, explained = _unit(works[kind])
    index, strength = explained.unit.index, 3.0
    prompts = [np.array(range(a, a + n), dtype=np.int32) for a, n in ((100, 7), (130, 4), (20, 11))]
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    hooks = steering(source, index, strength, everywhere)
    intact, steered = continued(source, prompts, [None, hooks], n_tokens=6, seed=0, temperature=0.0)
    for found, changes in ((intact, False), (steered, True)):
        for prompt, written in zip(prompts, found, strict=True):
            ids = [int(token) for token in prompt]
            for token in written:
                where = torch.arange(len(ids))[None] >= len(prompt) - 1
                with torch.no_grad():
                    tree = steering(source, index, strength, where) if changes else None
                    logits = source.model(torch.tensor([ids]), hooks=tree)[0, -1]
                assert logits[token] >= logits.max() - 1e-4
                ids.append(token)
    assert intact != steered


def test_draws_are_the_same_whatever_is_steered(works: dict[str, SourceWork]) -> None:
    source = works["neuron"].source
    prompts = [np.array([100, 101, 102], dtype=np.int32)] * 2
    same = steering(source, 0, 0.0, torch.zeros(1, 1, dtype=torch.bool))  # changes nothing
    intact, unsteered = continued(source, prompts, [None, same], n_tokens=8, seed=3)
    assert intact == unsteered and intact[0] != intact[1]
    assert intact == continued(source, prompts, [None], n_tokens=8, seed=3)[0]
    with pytest.raises(RequestError, match="leave no room"):
        continued(source, prompts, [None], n_tokens=64, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_continuations_say_where_they_begin_and_how_far_the_unit_was_steered(
    works: dict[str, SourceWork], kind: str
) -> None:
    _, explained = _unit(works[kind])
    effects = _effects(works[kind], n_tokens=5, divergence=0.1)
    found = effects.continuations(explained.unit)
    assert len(found) == 4 and len(effects.continuations(explained.unit, "test", 2)) == 2
    assert np.mean([one.divergence or 0.0 for one in found]) == pytest.approx(0.1, rel=0.05)
    assert all(one.intact and one.steered and one.text for one in found)
    assert any(one.intact != one.steered for one in found)
    assert effects.continuations(explained.unit) == found


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_effects_are_of_the_part_that_is_asked_for(works: dict[str, SourceWork], part: str) -> None:
    _, explained = _unit(works["neuron"])
    effects = _effects(works["neuron"], n_tokens=2)
    own = {
        one.identity
        for one in explained.held.part(part).records(np.arange((explained.held.part(part).rows).size))
    }
    found = [*effects(explained.unit, part), *effects.continuations(explained.unit, part)]  # type: ignore[arg-type]
    assert found and {one.of for one in found} <= own
    assert any(one.of in own for one in found if isinstance(one, Effect) and one.kind == "steer")


def test_ablated_windows_reach_from_the_loudest_to_the_quietest(works: dict[str, SourceWork]) -> None:
    _, explained = _unit(works["neuron"])
    held = explained.held.part("test")
    largest = {w.identity: w.max_activation for w in held.records(np.arange(held.rows.size))}
    loud = sorted((v for v in largest.values() if v > explained.firing_threshold), reverse=True)
    found = [one.of for one in _effects(works["neuron"])(explained.unit) if one.kind == "ablate"]
    levels = [largest[of] for of in found if of is not None]
    assert levels == sorted(levels, reverse=True) and levels[0] == loud[0]
    assert levels[-1] <= loud[len(loud) // 2]


@pytest.mark.parametrize("kind", ["neuron", "relu", "direction"])
def test_a_true_simulation_moves_nothing_and_the_mean_moves_as_far_as_the_mean(
    works: dict[str, SourceWork], kind: str
) -> None:
    _, explained = _unit(works[kind])
    held = explained.held.part("test")
    order = np.argsort(-held.largest())[:5].astype(np.int64)
    identities = [window.identity for window in held.records(order)]
    mean = float(explained.held.moments[0])
    effects = _effects(works[kind])
    true = np.where(held.mask, held.activations, np.nan)[order].astype(np.float64)
    exact = effects.simulated(explained.unit, identities, true)
    assert exact.shape == (5, 2) and (exact[:, 0] < 1e-4 * exact[:, 1]).all() and (exact[:, 1] > 0).all()
    flat = effects.simulated(explained.unit, identities, np.where(np.isnan(true), np.nan, mean))
    np.testing.assert_allclose(flat[:, 0], flat[:, 1], rtol=1e-5)
    nothing = effects.simulated(explained.unit, identities, np.full_like(true, np.nan))
    assert (nothing < 1e-7).all()


def test_the_divergence_of_a_simulation_is_jensen_and_shannons(works: dict[str, SourceWork]) -> None:
    source, explained = _unit(works["neuron"])
    held = explained.held.part("test")
    (window,) = held.records(np.array([0]))
    simulated = np.full((1, len(window.tokens)), 2.5)
    found = _effects(works["neuron"]).simulated(explained.unit, [window.identity], simulated)[0, 0]
    windows = works["neuron"].harvest.windows
    ids = windows.columns["token"][held.rows[0], : windows.context + windows.length]
    ids = torch.from_numpy(ids[ids != ABSENT].astype(np.int64))[None]
    begin = int(windows.context_position[held.rows[0]])
    where = torch.zeros(ids.shape, dtype=torch.bool)
    where[0, begin : begin + len(window.tokens)] = True
    with torch.no_grad():
        p = source.model(ids).softmax(-1).double()
        hooks = source.replacing(explained.unit.index, 2.5, where)
        q = source.model(ids, hooks=hooks).softmax(-1).double()
    m = (p + q) / 2
    each = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    expected = each[0, begin : begin + len(window.tokens)].mean()
    assert found == pytest.approx(float(expected), rel=1e-3)


def test_a_head_has_no_simulation_to_be_replaced_by(works: dict[str, SourceWork]) -> None:
    _, explained = _unit(works["head"])
    with pytest.raises(RequestError, match="says nothing of the direction"):
        _effects(works["head"]).simulated(explained.unit, [], np.zeros((0, 16)))
    other = _unit(works["neuron"])[1].unit
    with pytest.raises(RequestError, match="is no unit of"):
        _effects(works["head"]).continuations(other)
    with pytest.raises(RequestError, match="divergence is above 0"):
        _effects(works["head"], divergence=0.0)


def test_divergences_are_of_the_intact_from_the_changed() -> None:
    a, b = (torch.randn(3, 7, generator=torch.Generator().manual_seed(s)).log_softmax(-1) for s in (0, 1))
    expected = torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergences(a, b), expected)
