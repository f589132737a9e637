"""Dense activations: every token once, killed and resumed the same, and the stream a trainer reads."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from explain import planted

from neuron_lens.autoencoder_training import ActivationStream
from neuron_lens.autoencoder_training.stored import StoredStream
from neuron_lens.errors import RequestError
from neuron_lens.harvest.corpus import Corpus
from neuron_lens.harvest.dense import StoredActivations, store_activations
from neuron_lens.hooks import TransformerHooks
from neuron_lens.transformer import Transformer

SITES = [("resid.torso.post_mlp", 0), ("attn.v_out", 0)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return planted.model()


def corpus() -> Corpus:
    return planted.corpus(20, 300)


def _stored(model: Transformer, folder: Path, **options: object) -> StoredActivations:
    return store_activations(model, corpus(), SITES, folder, shard_tokens=1500, progress=False, **options)  # type: ignore[arg-type]


def test_every_token_is_there_once_as_the_model_holds_it(model: Transformer, tmp_path: Path) -> None:
    store = _stored(model, tmp_path, dtype="float32")
    documents = [model.tokenizer.encode(document.text, bos=False) for document in corpus()]
    expected = [(number, place) for number, ids in enumerate(documents) for place in range(len(ids))]
    assert [tuple(place) for place in store.places.tolist()] == expected
    assert len(store) == len(expected) == sum(store.row_sizes) and len(store.shards(*SITES[0])) > 2
    hooks = TransformerHooks()
    recordings = {site: hooks.record(site) for site, _ in SITES}
    with torch.no_grad():
        model(torch.tensor([documents[3][:96]]), hooks=hooks)
    begin = expected.index((3, 0))
    for site, layer in SITES:
        wanted = recordings[site][site, layer][0].flatten(1)
        read = store.rows(site, layer, np.arange(begin, begin + 96))
        torch.testing.assert_close(read, wanted, atol=1e-5, rtol=1e-4)
        joined = np.concatenate(store.shards(site, layer))
        assert np.array_equal(joined[begin : begin + 96], read.numpy())
    assert isinstance(store.shards(*SITES[0])[0], np.memmap)


def test_an_interrupted_pass_ends_with_the_same_files(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _stored(model, tmp_path / "whole")
    forward, calls = Transformer.forward, iter(range(1000))

    def failing(own: Transformer, *arguments: object, **options: object) -> object:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(own, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            _stored(model, tmp_path / "again")
    with pytest.raises(RequestError, match="is not complete"):
        StoredActivations.open(tmp_path / "again")
    _stored(model, tmp_path / "again")
    for path in whole.folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    stamp = (tmp_path / "again" / "manifest.json").stat().st_mtime_ns
    _stored(model, tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("target", [None, SITES[1]])
def test_a_trainer_reads_the_stream_it_would_have_made(
    model: Transformer, tmp_path: Path, target: tuple[str, int] | None
) -> None:
    store = _stored(model, tmp_path, split="train", dtype="float32")
    sizes = {"batch_tokens": 64, "buffer_tokens": 300, "seed": 0, "target": target}
    live = ActivationStream(model, corpus(), *SITES[0], **sizes)  # type: ignore[arg-type]
    stored = StoredStream(store, *SITES[0], **sizes)  # type: ignore[arg-type]
    assert stored.tokens_per_epoch == live.tokens_per_epoch
    for start in (0, 70):  # the second is beyond the first epoch
        for one, other in islice(zip(live.batches(start), stored.batches(start), strict=False), 4):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
            assert [part.shape for part in live.parted(one)] == [part.shape for part in stored.parted(other)]
    with pytest.raises(RequestError, match="less than one batch"):
        StoredStream(store, *SITES[0], batch_tokens=10**6, buffer_tokens=1)


def test_what_cannot_be_stored_or_read_is_refused(model: Transformer, tmp_path: Path) -> None:
    store = _stored(model, tmp_path / "store")
    with pytest.raises(RequestError, match="is not stored"):
        store.shards("mlp.post_act", 0)
    with pytest.raises(RequestError, match="tokens"):
        store.rows(*SITES[0], [len(store)])
    with pytest.raises(RequestError, match="give another folder"):
        _stored(model, tmp_path / "store", dtype="float32")
    for sites, complaint in (
        ([], "at least one site"), ([("mlp.post_act", 1)], "layer 1 does not exist"), ([("mlp.post", 0)], "no site"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=complaint):
            store_activations(model, corpus(), sites, tmp_path / "other", progress=False)
    for option, complaint in (({"split": "dev"}, "no part 'dev'"), ({"dtype": "bfloat16"}, "not 'bfloat16'")):
        with pytest.raises(RequestError, match=complaint):
            _stored(model, tmp_path / "other", **option)
    assert not (tmp_path / "other").exists()
    (tmp_path / "store" / "resid.torso.post_mlp.layer0-1.npy").write_bytes(b"nonsense")
    with pytest.raises(RequestError, match="cannot be read"):
        StoredActivations.open(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text("[]")
    with pytest.raises(RequestError, match="not that of stored activations"):
        StoredActivations.open(tmp_path / "store")
    with pytest.raises(RequestError, match="holds no stored"):
        StoredActivations.open(tmp_path / "nothing")
