"""A study from prompts to a saved table, on the shipped small model: the way HookedModel is meant to be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuron_lens.faces.hooked_model import (
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


def data_set(verb: str) -> list[list[str]]:
    """64 prompts in four batches."""
    prompts = [f"Once upon a time, {name} {verb} a {thing} and" for name in NAMES for thing in THINGS]
    return [prompts[at : at + 16] for at in range(0, 64, 16)]


@pytest.mark.skipif(
    not (model_defs_dir() / "pico" / "model.safetensors").is_file(),
    reason="the small model is not in this checkout",
)
def test_a_study_of_heads(tmp_path: Path) -> None:
    model = HookedModel.from_pretrained("pico")
    tokenizer = model.get_tokenizer()
    layers, heads = model.model.config.n_layers, model.model.config.n_heads
    saw, lost = data_set("saw"), data_set("lost")
    # where each prompt is cut: the partition before and after the third token
    cut = {"pivot_positions": [3]}

    # activations of the first data set, at the last token and over what stands before the cut, streamed to disk
    saver = ActivationSaver(tmp_path, "heads")
    config = ExtractionConfig(extract_resid_out=True, avg=True, save_logits=False)
    stored = model.extract_cache(
        saw, ["last", "inputs-partition-0"], config, stream_to=saver, tag="saw", **cut
    )
    assert isinstance(stored, StoredCache)
    assert stored["resid_out_0"].shape == (64, 2, model.model.config.d_model)

    # each head's mean over the second data set, at the last token
    means = model.extract_cache(lost, ["last"], ExtractionConfig(extract_head_z=True, avg_over_example=True))
    assert means["avg_head_z_L0H0"].shape == (1, 1, model.model.config.d_head)

    # mean ablation of each head alone: the change in the difference of two next tokens, as a table and a heatmap
    yes, no = (tokenizer.encode(text, bos=False)[0] for text in (" was", " the"))
    cells = [
        Intervention(activation=f"head_z_L{layer}H{head}", token_positions=["last"], source=means)
        for layer in range(layers)
        for head in range(heads)
    ]
    result = model.sweep(
        saw[0][:8], cells, LogitDifference(yes, no), axes={"layer": range(layers), "head": range(heads)}
    )
    assert result.effect().shape == (layers, heads)
    assert result.effect().abs().max() > 0
    assert result.to_svg().count("<title>") >= layers * heads
    one = model.forward(saw[0][:8], ["last"], interventions=[cells[-1]])["logits"][:, 0]
    assert torch.allclose(result.per_example()[-1, -1], one[:, yes] - one[:, no], atol=1e-3)
    table = pytest.importorskip("pandas") and result.to_dataframe()
    assert list(table.columns[:2]) == ["layer", "head"] and len(table) == layers * heads

    # how far the stream of the second data set carries over, at every layer
    patched = model.compute_patching(
        ["last"],
        lost[:1],
        saw[:1],
        {"patching_elem": "@last", "layers_to_patch": "all", "activation_type": "resid_in_{}"},
        [[yes]],
        [[no]],
        return_logit_diff=True,
        each="layer",
    )
    assert patched["sweep_kl_patched|base"].shape == (16, layers, 1)
    # everything is patched in the deepest layer's stream: what is left is closer to base than where it started
    assert patched["kl_patched|base"].mean() < patched["kl_clean|base"].mean()

    # saved, found again, and the same
    saver.save(patched, model, ["last"], tag="patched")
    loaded, metadata = ActivationLoader.from_saver(saver).query(tag="patched", model_name="pico").load()
    assert metadata["target_token_positions"] == ["last"]
    assert torch.equal(loaded["kl_patched|base"], patched["kl_patched|base"])
    again, _ = ActivationLoader.from_saver(saver).query(tag="saw", extraction_config=config).load()
    assert torch.equal(again["resid_out_0"], stored["resid_out_0"])

    # and what a reader would try first
    best = model.predict(saw[0][0], k=3)
    assert len(best) <= 3 and all(0 < probability < 1 for probability in best.values())
    written = model.generate(saw[0][0], {"max_new_tokens": 4, "temperature": 0.0}, return_text=True)
    assert len(written) == 1 and isinstance(written[0], str)
