"""A study from prompts to a saved table, on the shipped small model: the way HookedModel is meant to be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuron_lens.faces.hooked_model import (
    ActivationCache,
    ActivationLoader,
    ActivationSaver,
    ExtractionConfig,
    HookedModel,
    Intervention,
    StoredCache,
)
from neuron_lens.files.model_defs import model_defs_dir
from neuron_lens.interventions import LogitDifference

NAMES = ["Tom", "Anna", "Lily", "Ben", "Max", "Sara", "Jack", "Mia"]
THINGS = ["ball", "dog", "book", "cake", "hat", "bird", "car", "tree"]

pytestmark = pytest.mark.skipif(
    not (model_defs_dir() / "pico" / "model.safetensors").is_file(),
    reason="the small model is not in this checkout",
)


def data_set(verb: str) -> list[str]:
    """64 prompts, of 15 to 18 tokens."""
    return [f"Once upon a time, {name} {verb} a {thing} and" for name in NAMES for thing in THINGS]


def in_batches(prompts: list[str]) -> list[list[str]]:
    """Four batches of 16."""
    return [prompts[at : at + 16] for at in range(0, len(prompts), 16)]


def test_a_study_of_heads(tmp_path: Path) -> None:
    model = HookedModel.from_pretrained("pico")
    sizes, tokenizer = model.model.config, model.get_tokenizer()
    layers, heads = sizes.n_layers, sizes.n_heads
    saw, lost = data_set("saw"), data_set("lost")
    assert len(saw) == len(lost) == 64
    cut = {"pivot_positions": [5]}  # each prompt is cut behind "Once upon a time"

    # activations of both data sets, at the last token and over the first partition, streamed to disk
    saver = ActivationSaver(tmp_path, "heads")
    positions = ["last", "inputs-partition-0"]
    config = ExtractionConfig(extract_resid_out=True, save_logits=False)
    stored = {}
    for tag, prompts in (("saw", saw), ("lost", lost)):
        stored[tag] = model.extract_cache(
            in_batches(prompts), positions, config, stream_to=saver, tag=tag, **cut
        )
        assert isinstance(stored[tag], StoredCache)
        assert stored[tag]["resid_out_0"].shape == (64, 6, sizes.d_model)
        assert stored[tag]["mapping_index"] == {"last": [0], "inputs-partition-0": [1, 2, 3, 4, 5]}
    # what stands before the cut is the same text in all prompts, what stands last has read the rest
    beginnings = [stored[tag]["resid_out_5"][:, 1:] for tag in ("saw", "lost")]
    assert torch.allclose(beginnings[0], beginnings[1], atol=1e-3)
    assert not torch.allclose(
        stored["saw"]["resid_out_5"][:, 0], stored["lost"]["resid_out_5"][:, 0], atol=0.1
    )

    # each head's mean over the second data set, at the last token
    mean_of_heads = ExtractionConfig(extract_head_z=True, avg_over_example=True, save_logits=False)
    means = model.extract_cache(in_batches(lost), ["last"], mean_of_heads)
    assert means["avg_head_z_L0H0"].shape == (1, 1, sizes.d_head) and means["n_examples"] == 64

    # mean ablation of each head alone: the change in the difference of two next tokens, over all 64 prompts
    yes, no = (tokenizer.encode(text, bos=False)[0] for text in (" was", " the"))
    cells = [
        Intervention(activation=f"head_z_L{layer}H{head}", token_positions=["last"], source=means)
        for layer in range(layers)
        for head in range(heads)
    ]
    result = model.sweep(
        saw, cells, LogitDifference(yes, no), axes={"layer": range(layers), "head": range(heads)}
    )
    assert result.per_example().shape == (layers, heads, 64)
    plain = model.forward(saw, ["last"])["logits"][:, 0]
    for layer, head in ((0, 3), (5, 1)):
        cell = cells[layer * heads + head]
        alone = model.forward(saw, ["last"], interventions=[cell])["logits"][:, 0] - plain
        change = (alone[:, yes] - alone[:, no]).mean()
        assert torch.allclose(result.effect()[layer, head], change, atol=1e-3)
    assert result.effect().abs().max() > 0.05
    # as a table and as a heatmap
    pytest.importorskip("pandas")
    table = result.to_dataframe()
    assert list(table.columns[:2]) == ["layer", "head"] and len(table) == layers * heads
    assert result.to_svg().count("<title>") >= layers * heads

    # how far the stream of the second data set carries over: all layers together, and each alone
    patched = model.compute_patching(
        ["last"],
        in_batches(lost),
        in_batches(saw),
        {"patching_elem": "@last", "layers_to_patch": "all", "activation_type": "resid_in_{}"},
        [[yes]] * 4,
        [[no]] * 4,
        return_logit_diff=True,
        each="layer",
    )
    assert patched["kl_patched|base"].shape == (64,)
    assert patched["sweep_kl_patched|base"].shape == (64, layers, 1)
    # with the last position patched in every layer, target comes closer to base, and the deeper the patch the more
    assert patched["kl_patched|base"].mean() < patched["kl_clean|base"].mean() / 4
    by_layer = patched["sweep_kl_patched|base"][:, :, 0].mean(0)
    assert by_layer[-1] < by_layer[2] < by_layer[0] < patched["kl_clean|base"].mean() * 1.01

    # saved, found again, and the same
    saver.save(patched, model, ["last"], tag="patched")
    loader = ActivationLoader.from_saver(saver)
    loaded, metadata = loader.query(tag="patched", model_name="pico").load()
    assert metadata["target_token_positions"] == ["last"]
    assert isinstance(loaded, ActivationCache)
    for key in set(patched) - {"metadata"}:
        assert repr(loaded[key]) == repr(patched[key])
    assert len(loader.query(extraction_config=config, target_token_positions=positions)) == 2
    again, _ = loader.query(tag="saw", extraction_config=config).load()
    assert torch.equal(again["resid_out_0"], stored["saw"]["resid_out_0"])


def test_the_first_things_a_reader_tries() -> None:
    model = HookedModel.from_pretrained("pico")
    prompt = data_set("saw")[0]
    best = model.predict(prompt, k=3)
    assert isinstance(best, dict) and all(0 < probability < 1 for probability in best.values())
    written = model.generate(prompt, {"max_new_tokens": 4, "temperature": 0.0}, return_text=True)
    assert len(written) == 1 and isinstance(written[0], str)
