"""The pass: killed and resumed equals uninterrupted, parts merged equal one pass, memory does not grow with text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from explain import planted
from safetensors.numpy import load_file

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site
from neuron_lens.errors import RequestError
from neuron_lens.harvest import kept
from neuron_lens.harvest.corpus import Corpus, Document, WindowShape
from neuron_lens.harvest.kept import SourceKeepers
from neuron_lens.harvest.part import HarvestPart
from neuron_lens.harvest.run import HarvestSettings, harvest, harvest_part, merge_harvests
from neuron_lens.harvest.sources import HeadSource, LatentSource, NeuronSource, UnitSource
from neuron_lens.transformer import Transformer

SETTINGS = HarvestSettings(
    shape=WindowShape(length=16, row_length=64, context=16),
    random=(12, 6, 6), top=(4, 3, 3), fired=(4, 2, 2), near=(2, 2, 2), reread=0.5, neighbours=2, batch_rows=2,
    shard_tokens=300,
)  # fmt: skip


FIRST_PASS, FORWARDS = 18, 29


def sources(model: Transformer) -> list[UnitSource]:
    config = AutoencoderConfig(
        d_in=30, d_latent=24, activation="topk", k=3, site_in=Site(path="resid.torso.post_mlp", layer=0)
    )
    autoencoder = Autoencoder(config, generator=torch.Generator().manual_seed(1))
    return [NeuronSource(model, 0), HeadSource(model, 0), LatentSource(model, autoencoder)]


def corpus() -> Corpus:
    return planted.corpus(12, 160)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return planted.model()


@pytest.fixture(scope="module")
def whole(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        counting = _Counting(patch)
        harvest(model, corpus(), sources(model), folder, SETTINGS, progress=False)
    # 36 rows in batches of 2, then those that are read again
    assert FIRST_PASS + 8 <= counting.n == FORWARDS
    return folder


class _Stopped(Exception):
    pass


class _Counting:
    """Counts forwards, and stops the pass before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_before: int | None = None) -> None:
        self.n, self.stop_before = 0, stop_before
        forward = Transformer.forward

        def counted(model: Transformer, *arguments: object, **options: object) -> object:
            if self.n == self.stop_before:
                raise _Stopped
            self.n += 1
            return forward(model, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(Transformer, "forward", counted)


@pytest.mark.parametrize("at", [0, 1, 4, 9, 14, FIRST_PASS, FIRST_PASS + 1, FIRST_PASS + 5, FORWARDS - 1])
def test_an_interrupted_pass_repeats_at_most_a_shard_and_ends_the_same(
    model: Transformer, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    with monkeypatch.context() as patch:
        _Counting(patch, stop_before=at)
        with pytest.raises(_Stopped):
            harvest(model, corpus(), sources(model), tmp_path, SETTINGS, progress=False)
    counting = _Counting(monkeypatch)
    harvest(model, corpus(), sources(model), tmp_path, SETTINGS, progress=False)
    assert _files(tmp_path) == _files(whole)
    # The 300 tokens of a shard are at most 4 batches, and of rows that are read again, which can be short, at most 6.
    assert counting.n <= FORWARDS - at + 4 + (6 if at > FIRST_PASS else 0)
    again = _Counting(monkeypatch)
    harvest(model, corpus(), sources(model), tmp_path, SETTINGS, progress=False)
    assert again.n == 0


_CHILD = """
import sys
sys.path.insert(0, {tests!r})
from harvest.test_run import SETTINGS, corpus, harvest, planted, sources
model = planted.model()
harvest(model, corpus(), sources(model), {folder!r}, SETTINGS, progress=False)
"""


@pytest.mark.parametrize(
    ("part", "delay"), [("parts/*/part-*", 0.0), ("parts/*/part-*", 0.03), ("parts/*/near/part-*", 0.0)]
)
def test_a_killed_pass_goes_on(
    model: Transformer, whole: Path, tmp_path: Path, part: str, delay: float
) -> None:
    code = _CHILD.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(part)) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(tmp_path.rglob("*")), "the child wrote nothing before it was killed"
    harvest(model, corpus(), sources(model), tmp_path, SETTINGS, progress=False)
    left = {name: data for name, data in _files(tmp_path).items() if not name.endswith(".tmp")}
    assert left == _files(whole)


def test_what_a_killed_writer_left_is_tidied_away(model: Transformer, whole: Path, tmp_path: Path) -> None:
    """Whatever it was killed at: the names it writes to before it renames are known."""
    with pytest.MonkeyPatch.context() as patch:
        _Counting(patch, stop_before=FORWARDS - 1)
        with pytest.raises(_Stopped):
            harvest(model, corpus(), sources(model), tmp_path, SETTINGS, progress=False)
    (part,) = (tmp_path / "parts").iterdir()
    for place in (part, part / "near"):
        for name in ("manifest.json.0123456789ab.tmp", "part-300.safetensors.0123456789ab.tmp"):
            (place / name).write_text("half")
    harvest(model, corpus(), sources(model), tmp_path, SETTINGS, progress=False)
    assert _files(tmp_path) == _files(whole)


def test_merged_parts_equal_one_pass(model: Transformer, whole: Path, tmp_path: Path) -> None:
    ranges = [range(8, 12), range(3), range(3, 8)]
    parts = [
        harvest_part(
            model, corpus(), sources(model), tmp_path / str(each.start), each, SETTINGS, progress=False
        )
        for each in ranges
    ]
    merge_harvests(model, corpus(), sources(model), parts, tmp_path / "merged", SETTINGS)
    for source in sources(model):
        one = load_file(whole / source.name / "activations.safetensors")
        other = load_file(tmp_path / "merged" / source.name / "activations.safetensors")
        assert one.keys() == other.keys()
        # Rows stand in other batches than in one pass, so that figures differ by the rounding of products.
        for name in one:
            if name.endswith((".activations", ".value")) or name in ("moments", "nearest.pearson"):
                assert np.allclose(one[name], other[name], atol=2e-3, rtol=1e-3), name
            elif not name.startswith(("nearest.", "near.")):
                assert np.array_equal(one[name], other[name]), name
        assert (
            _files(whole / source.name)["windows.safetensors"]
            == (_files(tmp_path / "merged" / source.name)["windows.safetensors"])
        )
    # What a part holds stays there: it can be merged again.
    assert [HarvestPart.open(part.folder) for part in parts] == parts


def test_parts_that_do_not_fit_are_refused(model: Transformer, tmp_path: Path) -> None:
    own = sources(model)[:1]

    def part(name: str, documents: range) -> HarvestPart:
        return harvest_part(model, corpus(), own, tmp_path / name, documents, SETTINGS, progress=False)

    first, last, overlapping = part("a", range(5)), part("b", range(5, 12)), part("c", range(4, 12))
    for parts, complaint in (
        ([first], "end at document 5"), ([last], "expected 0"), ([first, overlapping], "expected 5"), ([], "end at")
    ):  # fmt: skip
        with pytest.raises(RequestError, match=complaint):
            merge_harvests(model, corpus(), own, parts, tmp_path / "out", SETTINGS)
    with pytest.raises(RequestError, match="another model, corpus, source or settings"):
        merge_harvests(model, corpus(), sources(model)[1:2], [first, last], tmp_path / "out", SETTINGS)
    with pytest.raises(RequestError, match="do not fit the corpus"):
        part("d", range(5, 13))
    (tmp_path / "a" / "manifest.json").write_text("{}")
    with pytest.raises(RequestError, match="not that of a part"):
        part("a", range(5))
    (tmp_path / "b" / last.tensors).write_bytes(b"nonsense")
    with pytest.raises(RequestError, match="cannot be read"):
        last.state()
    with pytest.raises(RequestError, match="at least one source"):
        harvest(model, corpus(), [], tmp_path / "out", SETTINGS)


def _bytes_held(n_documents: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Transformer) -> int:
    """The most that all keepers hold between two batches."""
    most = 0
    update = SourceKeepers.update

    def measured(kept: SourceKeepers, *arguments: object) -> None:
        nonlocal most
        update(kept, *arguments)  # type: ignore[arg-type]
        most = max(most, sum(held.numel() * held.element_size() for held in kept.state().values()))

    text = planted.corpus(8, 200)
    documents = [Document(f"{i}", document.text) for i in range(n_documents // 8) for document in text]
    with monkeypatch.context() as patch:
        patch.setattr(SourceKeepers, "update", measured)
        harvest(model, Corpus.of_documents(documents), sources(model), tmp_path / str(n_documents), SETTINGS,
                progress=False)  # fmt: skip
    return most


def test_what_is_held_does_not_grow_with_the_text(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = _bytes_held(8, monkeypatch, tmp_path, model)
    assert _bytes_held(80, monkeypatch, tmp_path, model) <= 1.02 * few


def test_near_misses_are_silent_and_nearest_units_are_those_that_fire_together(
    model: Transformer, whole: Path
) -> None:
    done = harvest(model, corpus(), sources(model), whole, SETTINGS, progress=False)
    n_near = 0
    for source in sources(model):
        found = done[source.name]
        for index in source.indices:
            kept = found.unit(index)
            low, high = max(kept.moments[4], 0.0), max(kept.moments[5], 0.0)
            threshold = low + 0.25 * (high - low)
            n_near += len(kept.near_rows)
            assert (kept.near.max(1, initial=-np.inf) <= threshold).all()
            assert kept.nearest is not None and index not in kept.nearest.index
            split = found.windows.split[kept.random_rows]
            mask = found.windows.present[kept.random_rows][split == 0]
            own = kept.random[split == 0][mask]
            for other, pearson in zip(kept.nearest.index, kept.nearest.pearson, strict=True):
                theirs = found.unit(int(other)).random[split == 0][mask]
                expected = np.corrcoef(own, theirs)[0, 1] if own.std() > 0 and theirs.std() > 0 else 0.0
                assert pearson == pytest.approx(expected, abs=0.03)
            other = found.unit(int(kept.nearest.index[0]))
            fires, also = (
                one.random[split == 0][mask] > max(one.moments[4], 0) * 0.75 + max(one.moments[5], 0) * 0.25
                for one in (kept, other)
            )
            expected = (fires & also).sum() / max((fires | also).sum(), 1)
            assert kept.nearest.jaccard[0] == pytest.approx(expected, abs=0.03)
    assert n_near > 20


def test_wide_sources_taken_in_ranges_give_the_same(
    model: Transformer, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_UNITS_AT_ONCE", 7)
    harvest(model, corpus(), sources(model)[2:], tmp_path, SETTINGS, progress=False)
    (name,) = (path.name for path in tmp_path.iterdir())
    one, other = (load_file(folder / name / "activations.safetensors") for folder in (whole, tmp_path))
    moments = one.pop("moments"), other.pop("moments")
    assert np.allclose(*moments, atol=1e-5)  # sums of float32 columns of another width round otherwise
    assert all(np.array_equal(one[key], other[key]) for key in one) and one.keys() == other.keys()
