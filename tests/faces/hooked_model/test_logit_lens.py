"""The lenses read a stream as the model reads its last one: parts sum to the logits, what is not translated stays plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from faces.hooked_model.cases import all_inputs, both_families, face, inputs, near

from neuron_lens.errors import CheckpointError, RequestError
from neuron_lens.faces.hooked_model import ActivationCache, ExtractionConfig, HookedModel, LogitLens

PARTS = ExtractionConfig(
    extract_embed=True,
    extract_resid_in=True,
    extract_resid_out=True,
    extract_mlp_out=True,
    extract_head_out=True,
    extract_last_layernorm=True,
)


def extracted(model: HookedModel, case: str, **options: Any) -> ActivationCache:
    """The streams and their parts at two positions."""
    return model.forward(inputs(case), ["last", 1], extraction_config=PARTS, **options)


@both_families
@all_inputs
def test_the_last_stream_gives_the_logits_and_all_parts_sum_to_them(family: str, case: str) -> None:
    model = face(family)
    cache, lens = extracted(model, case), LogitLens(model)
    layers, config = model.model.config.n_layers, model.model.config
    assert near(lens.compute(cache, "resid_out_2")["logit_lens_resid_out_2"], cache["logits"])
    total: Any = 0
    for key in ("input_embeddings", "mlp_out_{i}", "head_out_L{i}H{j}"):
        total = total + sum(lens.compute(cache, key, statistics="final").values())
    for layer in range(layers):  # what no head owns
        bias = model.model.blocks[layer].attn.out.bias
        if bias is not None:
            cache["mlp_out_0"] = bias.detach().expand_as(cache["mlp_out_0"]).clone()
            total = total + lens.compute(cache, "mlp_out_0", statistics="final")["logit_lens_mlp_out_0"]
    norm = model.model.ln_f
    if norm.bias is not None:
        total = total + model.model.unembed.weight @ norm.bias
    assert near(total, cache["logits"])
    assert len(lens.get_keys(cache, "head_out_L{}H{}")) == layers * config.n_heads


@both_families
def test_directions_are_entries_and_differences_of_the_logits(family: str) -> None:
    model = face(family)
    cache, lens = extracted(model, "left"), LogitLens.from_model(model.model)
    whole = lens.compute(cache, "resid_out_1")["logit_lens_resid_out_1"]
    rows, pairs = torch.arange(3), [(1, 5), (7, 2), (0, 22)]
    first, second = (whole[rows, :, [pair[i] for pair in pairs]] for i in (0, 1))
    one = lens.compute(cache, "resid_out_1", [1, 7, 0])
    assert near(one["logit_lens_resid_out_1"], first)
    two = lens.compute(cache, "resid_out_1", pairs)
    assert near(two["logit_lens_resid_out_1"], first - second)
    accuracy = lens.compute(cache, "resid_out_1", pairs, metric="accuracy")
    assert near(accuracy["logit_lens_resid_out_1"], (first > second).float().mean(0))
    probable = lens.compute(cache, "resid_out_1", pairs, apply_softmax=True)["logit_lens_resid_out_1"]
    chances = whole.softmax(-1)
    assert near(probable[0], chances[0, :, 1] - chances[0, :, 5])
    unnormed = lens.compute(cache, "resid_out_1", apply_norm=False)["logit_lens_resid_out_1"]
    assert near(unnormed, cache["resid_out_1"] @ model.model.unembed.weight.T)


@pytest.mark.parametrize("statistics", ["own", "final"])
def test_a_ragged_row_is_the_row_of_equal_ones(statistics: Any) -> None:
    model = face("llama")
    lens, directions = LogitLens(model), [(1, 2), (3, 4), (5, 6)]
    rows = lens.compute(
        extracted(model, "left", ragged=True), "resid_out_1", directions, statistics=statistics
    )
    whole = lens.compute(extracted(model, "left"), "resid_out_1", directions, statistics=statistics)
    for row, same in zip(*rows.values(), *whole.values(), strict=True):
        assert near(row, same)


def saved_lens(folder: Path, layers: int, width: int, scale: float, bias: bool = True) -> None:
    """A tuned lens as its project writes it."""
    folder.mkdir()
    state = {}
    for layer in range(layers):
        state[f"{layer}.weight"] = scale * (layer + 1) * torch.eye(width)
        if bias:
            state[f"{layer}.bias"] = torch.full((width,), scale * layer)
    torch.save(state, folder / "params.pt")
    (folder / "config.json").write_text(
        json.dumps({"d_model": width, "num_hidden_layers": layers, "bias": bias})
    )


def test_a_tuned_lens_adds_its_translation_of_the_stream_entering_a_layer(tmp_path: Path) -> None:
    model = face()
    cache, plain = extracted(model, "several"), LogitLens(model)
    saved_lens(tmp_path / "zero", 3, 16, 0.0, bias=False)
    nothing = LogitLens.from_tuned_lens(model, tmp_path / "zero")
    for key in ("resid_in_1", "resid_out_0", "input_embeddings"):
        assert near(*nothing.compute(cache, key).values(), *plain.compute(cache, key).values())
    saved_lens(tmp_path / "one", 3, 16, 0.1)
    tuned = LogitLens.from_tuned_lens(model, tmp_path / "one")
    moved = cache["resid_in_2"] * 1.3 + 0.2  # the third translator: 0.3 times the stream and 0.2
    expected = model.model.unembed(model.model.ln_f(moved))
    assert near(*tuned.compute(cache, "resid_in_2").values(), expected)
    assert near(*tuned.compute(cache, "resid_out_1").values(), expected)
    assert near(*tuned.compute(cache, "resid_out_2").values(), cache["logits"])  # nothing left to translate
    with pytest.raises(RequestError, match="between layers"):
        tuned.compute(cache, "mlp_out_1")
    with pytest.raises(RequestError, match="linearly"):
        tuned.compute(cache, "resid_in_1", statistics="final")
    saved_lens(tmp_path / "other", 2, 8, 0.1)
    with pytest.raises(CheckpointError, match="2 layers of width 8; the model has 3 of 16"):
        LogitLens.from_tuned_lens(model, tmp_path / "other")
    (tmp_path / "other" / "params.pt").write_bytes(b"no checkpoint")
    for folder in ("other", "none"):
        with pytest.raises(CheckpointError, match="holds no tuned lens"):
            LogitLens.from_tuned_lens(model, tmp_path / folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_key": "resid_out_9"}, "no key 'resid_out_9'"),
        ({"target_key": "head_z_L0H0"}, "no vectors of the stream"),
        ({"token_directions": [1, 2]}, "each of 3 examples"),
        ({"token_directions": [1, 2, 99]}, "below 23"),
        ({"token_directions": [1, (2, 3), 4]}, "each of 3 examples"),
        ({"metric": "accuracy"}, "give token_directions"),
        ({"metric": "accuracy", "token_directions": [1, 2, 3]}, "a pair of ids"),
        ({"metric": "loss"}, "metric is"),
        ({"statistics": "final", "apply_norm": False}, "linearly"),
    ],
)
def test_lenses_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    model = face()
    config = ExtractionConfig(extract_resid_out=True, extract_head_z=True)
    cache = model.forward(inputs("several"), extraction_config=config)
    with pytest.raises(RequestError, match=message):
        LogitLens(model).compute(cache, **{"target_key": "resid_out_1", **options})


def test_statistics_of_the_final_norm_must_be_there_and_not_averaged() -> None:
    model = face()
    without = model.forward(inputs("several"), extraction_config=ExtractionConfig(extract_resid_out=True))
    with pytest.raises(RequestError, match="extract_last_layernorm"):
        LogitLens(model).compute(without, "resid_out_1", statistics="final")
    averaged = ExtractionConfig(extract_resid_out=True, extract_last_layernorm=True, avg=True)
    cache = model.forward(inputs("several"), ["all", "last"], extraction_config=averaged)
    assert LogitLens(model).compute(cache, "resid_out_1")["logit_lens_resid_out_1"].shape == (3, 2, 23)
    with pytest.raises(RequestError, match="no statistics of its own"):
        LogitLens(model).compute(cache, "resid_out_1", statistics="final")
