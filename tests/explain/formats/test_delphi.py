"""Delphi's cache: what is added is what is read, whatever the batches; and its text files."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from neuron_lens.errors import CheckpointError, RequestError
from neuron_lens.explain.formats import delphi
from neuron_lens.explain.formats.delphi import LatentCache, LatentCacheWriter
from neuron_lens.explain.formats.delphi_results import (
    DelphiScore,
    explained_latents,
    read_explanation,
    read_scores,
    write_explanation,
    write_scores,
)

CONFIG = {"model_name": "pico", "dataset_repo": "texts"}
MODULE = "layers.1.mlp"


def write(folder: Path, dense: np.ndarray, tokens: np.ndarray, cuts: list[int], n_splits: int) -> None:
    """Write `dense` `[row, pos, latent]` in batches of rows that end at the cuts."""
    with LatentCacheWriter(
        folder, MODULE, n_latents=dense.shape[2], n_splits=n_splits, config=CONFIG
    ) as writer:
        for begin, end in pairwise([0, *cuts, len(dense)]):
            own = dense[begin:end]
            writer.add(tokens[begin:end], np.argwhere(own), own[own != 0])


@st.composite
def sparse(draw: st.DrawFn) -> np.ndarray:
    """Small activations that float16 holds, mostly zero, `[row, pos, latent]`."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9)))
    seed, density = draw(st.integers(0, 2**16)), draw(st.sampled_from([0.0, 0.1, 0.6]))
    random = np.random.default_rng(seed)
    return np.where(random.random(shape) < density, random.integers(-8, 9, shape) / 4, 0.0)


@given(sparse(), st.data())
@settings(max_examples=30)
def test_what_is_added_is_read_whatever_the_batches(
    tmp_path_factory: pytest.TempPathFactory, dense: np.ndarray, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    rows, context, n_latents = dense.shape
    tokens = np.arange(rows * context).reshape(rows, context)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
    n_splits = data.draw(st.integers(1, n_latents))
    write(folder, dense, tokens, cuts, n_splits)
    cache = LatentCache(folder, MODULE)
    assert cache.latents == range(n_latents)
    assert len(cache.starts) == n_splits
    np.testing.assert_array_equal(cache.tokens, tokens)
    for latent in data.draw(st.permutations(range(n_latents))):
        np.testing.assert_array_equal(cache.dense(latent), dense[:, :, latent])
        assert len(cache.latent(latent).activations) == np.count_nonzero(dense[:, :, latent])
    assert [latent for latent, _ in cache] == list(range(n_latents))
    assert cache.config == {
        **CONFIG, "ctx_len": context, "cache_ctx_len": context, "n_tokens": rows * context, "n_splits": n_splits,
    }  # fmt: skip
    assert not [path for path in cache.folder.iterdir() if path.name.startswith(".") or path.suffix == ".tmp"]


def test_the_files_are_delphis(tmp_path: Path) -> None:
    dense = np.zeros((2, 3, 10))
    dense[1, 2, 7], dense[0, 1, 9], dense[0, 0, 2] = 1.5, 0.25, 4.0
    tokens = np.arange(6).reshape(2, 3)
    write(tmp_path, dense, tokens, [1], 2)
    folder = tmp_path / "latents" / MODULE
    assert sorted(path.name for path in folder.iterdir()) == [
        "0_4.safetensors",
        "5_9.safetensors",
        "config.json",
    ]
    loaded = load_file(folder / "5_9.safetensors")
    assert {name: str(value.dtype) for name, value in loaded.items()} == {
        "locations": "uint16", "activations": "float16", "tokens": "int64",
    }  # fmt: skip
    assert loaded["locations"].tolist() == [[0, 1, 4], [1, 2, 2]]
    assert loaded["activations"].tolist() == [0.25, 1.5]
    assert loaded["tokens"].tolist() == tokens.tolist()


def test_many_latents_need_wider_locations(tmp_path: Path) -> None:
    with LatentCacheWriter(tmp_path, MODULE, n_latents=70_000, n_splits=1, config=CONFIG) as writer:
        writer.add([[5, 6]], [[0, 1, 69_999]], [2.0])
    loaded = load_file(tmp_path / "latents" / MODULE / "0_69999.safetensors")
    assert loaded["locations"].dtype == np.uint32
    assert LatentCache(tmp_path, MODULE).latent(69_999).positions.tolist() == [1]


def test_a_hand_made_cache_without_tokens_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "latents" / MODULE
    folder.mkdir(parents=True)
    locations = np.array([[3, 1, 0], [4, 0, 0], [0, 0, 2]], dtype=np.uint32)
    save_file(
        {"locations": locations, "activations": np.array([1, 2, 3], np.float16)}, folder / "8_11.safetensors"
    )
    cache = LatentCache(tmp_path, MODULE)
    assert cache.latent(8).rows.tolist() == [3, 4]
    assert cache.latent(10).activations.tolist() == [3.0]
    assert cache.latent(9).rows.tolist() == []
    with pytest.raises(RequestError, match="holds no tokens"):
        cache.dense(8)
    with pytest.raises(RequestError, match=r"latent 12 is not in"):
        cache.latent(12)
    with pytest.raises(RequestError, match=r"latent -1 is not in"):
        cache.latent(-1)


def test_memory_does_not_grow_with_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delphi, "_CHUNK", 1000)
    random = np.random.default_rng(0)
    locations = random.integers(0, [8, 64, 500], (2000, 3))
    batch = random.integers(0, 99, (8, 64)), locations, random.random(2000)
    peaks = {}
    for n_batches in (4, 4, 40):  # the first time only warms up
        tracemalloc.start()
        folder = tmp_path / str(n_batches)
        with LatentCacheWriter(folder, MODULE, n_latents=500, n_splits=2, config=CONFIG) as writer:
            for _ in range(n_batches):
                writer.add(*batch)
        peaks[n_batches] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert LatentCache(folder, MODULE).tokens.shape == (8 * n_batches, 64)
    smallest_file = min(path.stat().st_size for path in (tmp_path / "40").rglob("*.safetensors"))
    assert peaks[40] < peaks[4] + smallest_file / 8


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        LatentCacheWriter(tmp_path, MODULE, n_latents=3, n_splits=1, config=CONFIG) as writer,
    ):
        writer.add([[1]], [[0, 0, 0]], [1.0])
        raise KeyboardInterrupt
    assert list((tmp_path / "latents" / MODULE).iterdir()) == []
    with (
        pytest.raises(RequestError, match="nothing was added"),
        LatentCacheWriter(tmp_path, MODULE, n_latents=3, n_splits=1, config=CONFIG),
    ):
        pass


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (([[1, 2]], [[-1, 0, 0]], [1.0]), "row -1; expected 0 to 0"),
        (([[1, 2]], [[0, 2, 0]], [1.0]), "position 2; expected 0 to 1"),
        (([[1, 2]], [[0, 0, 3]], [1.0]), "latent 3; expected 0 to 2"),
        (([[1, 2]], [[0, 0, 0]], [1.0, 2.0]), r"\[1, 3\] and activations of shape \[2\]"),
        (([[1, 2]], [[0, 0]], [1.0]), r"expected \[n, 3\]"),
        (([[1, 2]], [[0.0, 0.0, 0.0]], [1.0]), "expected integers"),
        (([1, 2], [[0, 0, 0]], [1.0]), "tokens of shape"),
        (([[1, 2]], [[0, 1, 2]], [1e6]), r"\(0, 1, 2\) is not finite or above 65504"),
        (([[1, 2]], [[0, 1, 2]], [np.nan]), "not finite"),
        (([[1, 2, 3]], [[0, 0, 0]], [1.0]), "3 positions; the batches before had 2"),
    ],
)
def test_wrong_batches_are_refused(tmp_path: Path, batch: tuple[Any, Any, Any], said: str) -> None:
    with (
        pytest.raises(RequestError, match=said),
        LatentCacheWriter(tmp_path, MODULE, n_latents=3, n_splits=1, config=CONFIG) as writer,
    ):
        writer.add([[0, 0]], np.zeros((0, 3), dtype=int), [])
        writer.add(*batch)


def test_wrong_caches_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "latents" / MODULE
    with pytest.raises(RequestError, match="holds no latent cache"):
        LatentCache(tmp_path, MODULE)
    with pytest.raises(RequestError, match="no module name"):
        LatentCache(tmp_path, "../other")
    with pytest.raises(RequestError, match="model_name"):
        LatentCacheWriter(tmp_path, MODULE, n_latents=3, n_splits=1, config={})
    with pytest.raises(RequestError, match="3 latents cannot be shared by 5 files"):
        LatentCacheWriter(tmp_path, MODULE, n_latents=3, config=CONFIG)
    write(tmp_path, np.ones((2, 2, 4)), np.zeros((2, 2), dtype=int), [], 2)
    path = folder / "2_3.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=r"2_3\.safetensors is truncated"):
        LatentCache(tmp_path, MODULE).latent(2)
    tensors = {"locations": np.array([[0, 0, 0]], np.uint16), "activations": np.zeros(2, np.float16)}
    save_file(tensors, path)
    with pytest.raises(RequestError, match=r"2_3\.safetensors: locations .* for 2 activations"):
        LatentCache(tmp_path, MODULE).latent(2)
    save_file(
        tensors | {"activations": np.zeros(1, np.float16), "locations": np.array([[0, 0, 2]], np.uint16)},
        path,
    )
    with pytest.raises(RequestError, match=r"2_3\.safetensors: locations hold the latent 2; expected 0 to 1"):
        LatentCache(tmp_path, MODULE).latent(2)
    save_file({"locations": np.zeros((1, 3), np.uint16)}, path)
    with pytest.raises(RequestError, match="lacks activations"):
        LatentCache(tmp_path, MODULE).latent(2)
    path.rename(folder / "3_3.safetensors")
    with pytest.raises(RequestError, match="latents from 3; expected 2"):
        LatentCache(tmp_path, MODULE)
    (folder / "3_3.safetensors").rename(folder / "odd.safetensors")
    with pytest.raises(RequestError, match="not named"):
        LatentCache(tmp_path, MODULE)


@given(st.text())
@settings(max_examples=20)
def test_explanations_come_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("run")
    path = write_explanation(folder, MODULE, 12, text)
    assert path == folder / "explanations" / f"{MODULE}_latent12.txt"
    assert json.loads(path.read_text(encoding="utf-8")) == text
    assert read_explanation(folder, MODULE, 12) == text
    assert list(explained_latents(folder)) == [(MODULE, 12)]


def test_scores_keep_fields_of_other_versions(tmp_path: Path) -> None:
    entry = {
        "str_tokens": ["a", " b"], "activations": [0.0, 2.5], "distance": 3, "activating": True,
        "prediction": None, "probability": 0.75, "correct": None, "judge_note": {"seen": 1},
    }  # fmt: skip
    path = tmp_path / "scores" / "fuzz" / f"{MODULE}_latent7.txt"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([entry, {"distance": -1}]))
    scores = read_scores(tmp_path, "fuzz", MODULE, 7)
    assert scores[0].activations == (0.0, 2.5) and scores[0].prediction is None
    written = write_scores(tmp_path, "detection", MODULE, 7, scores)
    assert json.loads(written.read_text()) == [entry, {"distance": -1}]
    assert read_scores(tmp_path, "detection", MODULE, 7) == scores
    write_scores(tmp_path, "fuzz", MODULE, 8, [DelphiScore(str_tokens=("a",), activations=(1.0, 2.0))])
    with pytest.raises(RequestError, match=r"latent8\.txt, entry 0: activations holds 2 values for 1"):
        read_scores(tmp_path, "fuzz", MODULE, 8)
    path.write_text('[{"activations": ["x"]}]')
    with pytest.raises(RequestError, match=r"latent7\.txt, entry 0 .* activations\.0"):
        read_scores(tmp_path, "fuzz", MODULE, 7)
    with pytest.raises(RequestError, match="there is no file"):
        read_explanation(tmp_path, MODULE, 7)
    with pytest.raises(RequestError, match="name no latent"):
        read_explanation(tmp_path, MODULE, -1)
