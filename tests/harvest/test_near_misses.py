"""Near misses: the unit is silent in them, they are those of similar units, and no part sees another's."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from explain import planted
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import PARTS, Evidence
from neuron_lens.explain.source_work import SourceWork
from neuron_lens.harvest.corpus import Corpus, Document, Row, WindowShape
from neuron_lens.harvest.cutter import Cutter
from neuron_lens.harvest.near_misses import NEAR_REASONS, Likeness, NearMisses
from neuron_lens.harvest.reproduce import recomputed
from neuron_lens.harvest.run import HarvestSettings, harvest
from neuron_lens.harvest.scratch import ScratchFile
from neuron_lens.harvest.shard import LayerHarvest
from neuron_lens.harvest.sources import Caught, NeuronSource, UnitSource
from neuron_lens.transformer import Transformer

from .test_run import corpus, sources

SETTINGS = HarvestSettings(
    shape=WindowShape(length=16, row_length=64, context=16),
    random=(24, 8, 8), top=(130, 60, 60), fired=(4, 2, 2), near=(80, 40, 40), reread=1.0, neighbours=3, batch_rows=4,
)  # fmt: skip
ANY, AFTER_DEF, ELSEWHERE = 0, 2, 3  # neurons that fire at " self": at any, after " def", after anything else


def siblings() -> Transformer:
    """The planted model with two neurons for one token in different company, and one for both; the fourth is dead."""
    model = planted.model()
    up = model.blocks[0].mlp.up
    with torch.no_grad():
        up.weight.zero_()
        up.weight[[ANY, AFTER_DEF, ELSEWHERE], 0] = 2.0  # is " self"
        up.weight[AFTER_DEF, 4], up.weight[ELSEWHERE, 4] = 2.0, -2.0  # the token before is " def"
        up.bias[AFTER_DEF] = -2.0
    return model


def sparse_corpus() -> Corpus:
    """Windows of 16 words: one in six says " def self", one in six " x self", the others nothing of the kind."""
    draw = random.Random(0)
    words = [word for word in planted.WORDS if word not in ("self", "def")]

    def window() -> list[str]:
        own = [draw.choice(words) for _ in range(16)]
        kind, place = draw.randrange(6), draw.randrange(1, 15)
        if kind < 2:
            own[place : place + 2] = [("def", "x")[kind], "self"]
        return own

    texts = ["".join(f" {word}" for _ in range(10) for word in window()) for _ in range(40)]
    return Corpus.of_documents([Document(f"{i}", text) for i, text in enumerate(texts)], "siblings")


def _harvested(folder: Path, reread: float) -> LayerHarvest:
    model = siblings()
    chosen = replace(SETTINGS, reread=reread)
    return harvest(model, sparse_corpus(), [NeuronSource(model, 0)], folder, chosen, progress=False)["layer0"]


def test_near_misses_of_siblings_are_each_others_windows(tmp_path: Path) -> None:
    once, twice = _harvested(tmp_path / "once", 0.0), _harvested(tmp_path / "twice", 1.0)
    windows = twice.windows
    assert np.array_equal(once.windows.columns["token"], windows.columns["token"])
    self_windows = twice.unit(ANY).top_rows
    for unit, sibling in ((AFTER_DEF, ELSEWHERE), (ELSEWHERE, AFTER_DEF)):
        theirs = twice.unit(sibling)
        firing = theirs.top_rows[theirs.top.max(1) > 1.0]
        assert set(firing) < set(self_windows) and len(firing) > 30
        found, sampled = twice.unit(unit), once.unit(unit)
        # In a window that holds both, it fires; of all others of its sibling none is left out.
        own = set(found.top_rows[found.top.max(1) > 0.5])
        assert set(found.near_rows) == set(firing) - own
        # Out of the sample alone there are fewer.
        assert set(sampled.near_rows) == set(firing) & set(once.unit(unit).random_rows) - own
        assert len(sampled.near_rows) < len(found.near_rows) / 2
        assert len(set(found.near_rows)) == len(found.near_rows), "listed once"
    assert not len(twice.unit(1).near_rows), "a dead unit misses nothing"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[UnitSource, LayerHarvest]]:
    """Neurons, heads and latents."""
    model = planted.model()
    folder = tmp_path_factory.mktemp("kinds")
    small = replace(
        SETTINGS, random=(12, 6, 6), top=(4, 3, 3), near=(3, 2, 2), reread=0.5, neighbours=2, shard_tokens=300
    )
    done = harvest(model, corpus(), sources(model), folder, small, progress=False)
    return [(source, done[source.name]) for source in sources(model)]


def test_near_misses_are_what_the_model_gives_and_silent(
    kinds: list[tuple[UnitSource, LayerHarvest]],
) -> None:
    for source, found in kinds:
        n_read_again = 0
        for index in source.indices:
            kept = found.unit(index)
            low, high = max(kept.moments[4], 0.0), max(kept.moments[5], 0.0)
            if not len(kept.near_rows):
                continue
            assert (kept.near.max(1) <= low + 0.25 * (high - low)).all()
            again = recomputed(source, found.windows, kept.near_rows.tolist(), [index])[0]
            present = found.windows.present[kept.near_rows]
            assert np.abs(again - kept.near)[present].max() < 2e-3 * high
            n_read_again += int((~np.isin(kept.near_rows, kept.random_rows)).sum())
            if source.has_partners:
                assert kept.partners is not None and len(kept.partners) == sum(
                    map(len, (kept.random_rows, kept.top_rows, kept.fired_rows, kept.near_rows))
                )
        assert n_read_again, f"the second pass found nothing of {source.name}"


def test_evidence_deals_near_misses_to_their_parts(kinds: list[tuple[UnitSource, LayerHarvest]]) -> None:
    n_near = 0
    for source, found in kinds:
        work = SourceWork(source, found)
        for index in source.indices[:4]:
            evidence = Evidence.of(work.explained(index))  # parts that share a token cannot be made
            own = found.unit(index)
            for code, name in enumerate(PARTS):
                part = evidence.part(name)
                n_near += len(part.near_misses)
                assert not any(evidence.fires(window) for window in part.near_misses)
                rows = own.near_rows[found.windows.split[own.near_rows] == code]
                places = {(int(found.windows.document[row]), int(found.windows.start[row])) for row in rows}
                assert {(w.document_index, w.start) for w in part.near_misses} <= places
    assert n_near > 30


def test_what_a_source_wants_does_not_depend_on_its_company(
    kinds: list[tuple[UnitSource, LayerHarvest]], tmp_path: Path
) -> None:
    source, together = kinds[0]
    small = replace(
        SETTINGS, random=(12, 6, 6), top=(4, 3, 3), near=(3, 2, 2), reread=0.5, neighbours=2, shard_tokens=300
    )
    alone = harvest(source.model, corpus(), [source], tmp_path, small, progress=False)[source.name]
    for index in source.indices:
        assert np.array_equal(alone.unit(index).near_rows, together.unit(index).near_rows)
        assert np.allclose(alone.unit(index).near, together.unit(index).near, atol=2e-3)


def test_a_share_of_the_corpus_is_asked_for() -> None:
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(RequestError, match="share of the corpus"):
            HarvestSettings(reread=share)


_N_UNITS, _LENGTH, _N_WINDOWS = 5, 3, 14


@given(seed=st.integers(0, 10_000), count=st.integers(0, 3), cut=st.integers(1, _N_WINDOWS - 1))
@settings(max_examples=30, deadline=None)
def test_the_best_are_kept_whatever_the_batches(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, cut: int
) -> None:
    """Against the definition, window by window."""
    draw = np.random.default_rng(seed)
    values = torch.from_numpy(draw.random((_N_WINDOWS, _LENGTH, _N_UNITS)).astype(np.float16)).float()
    ids = draw.integers(0, 6, (_N_WINDOWS, _LENGTH)).astype(np.int32)
    likeness = Likeness(
        nearest=torch.from_numpy(draw.integers(0, _N_UNITS, (_N_UNITS, 2))),
        weight=torch.from_numpy(draw.random((_N_UNITS, 2)) * draw.integers(0, 2, (_N_UNITS, 2))).float(),
        tokens=torch.from_numpy(draw.integers(-1, 6, (_N_UNITS, 2))),
        scale=torch.ones(_N_UNITS),
        threshold=torch.full((_N_UNITS,), 0.8),
    )
    rows = [Row(place, 0, 0, ids[place], int(draw.integers(0, 3))) for place in range(_N_WINDOWS)]
    whole = Cutter(rows, _LENGTH, 0, 0)
    near = NearMisses(likeness, whole.place.numpy(), [(0, 2), (2, _N_UNITS)], (count,) * 3, _LENGTH, False)
    order = torch.from_numpy(draw.permutation(_N_WINDOWS))
    for some in (order[:cut], order[cut:]):
        near.take(Caught(values), whole.only(some), torch.from_numpy(ids)[some])
    found = near.tensors(ScratchFile(tmp_path_factory.getbasetemp()))
    for unit in range(_N_UNITS):
        silent = [w for w in range(_N_WINDOWS) if values[w, :, unit].max() <= 0.8]
        for code in range(3):
            inside = [w for w in silent if rows[w].split == code]

            def similar(w: int, unit: int = unit) -> float:
                pairs = zip(likeness.nearest[unit], likeness.weight[unit], strict=True)
                shares = [(float(values[w, :, other].max()), float(weight)) for other, weight in pairs]
                return max((share * weight for share, weight in shares if share > 0.25), default=0.0)

            def matching(w: int, unit: int = unit) -> int:
                return sum(int(token) in ids[w] for token in likeness.tokens[unit])

            for reason, strength in zip(NEAR_REASONS, (similar, matching), strict=True):
                slots = (found["near.split"] == code) & (found["near.reason"] == NEAR_REASONS.index(reason))
                kept = [w for w in found["near.row"][unit, slots] if w >= 0]
                good = sorted((strength(w) for w in inside if strength(w) > 0), reverse=True)
                if reason == "similar":
                    assert [strength(w) for w in kept] == pytest.approx(good[:count])
                    listed = set(kept)
                else:
                    # Those already listed as similar are left out.
                    assert set(kept) <= set(inside) - listed
                    assert all(strength(w) >= max(good[:count][-1], 1) for w in kept)
                    assert len(kept) >= min(count, len(good)) - len(listed)
                for slot in np.flatnonzero(slots & (found["near.row"][unit] >= 0)):
                    own = values[found["near.row"][unit, slot], :, unit].numpy()
                    assert np.array_equal(found["near.activations"][unit, slot], own)
