"""Published names of sites are translated, or left alone; never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron_lens.autoencoders import Site
from neuron_lens.autoencoders.formats.gemma_scope import sites_in_path
from neuron_lens.autoencoders.formats.source import layer_in_path
from neuron_lens.autoencoders.sites import published_name, site_from_hookpoint, site_from_name


@pytest.mark.parametrize("layer", [0, 11])
@pytest.mark.parametrize(
    "name", ["hook_resid_post", "hook_resid_mid", "attn.hook_z", "hook_mlp_out", "mlp.hook_post"]
)
def test_hook_names_there_and_back(name: str, layer: int) -> None:
    site = site_from_name(f"blocks.{layer}.{name}")
    assert site == site_from_name(name, layer)
    assert site is not None
    assert published_name(site) == f"blocks.{layer}.{name}"


def test_unknown_names_give_no_site() -> None:
    assert site_from_name("blocks.3.attn.hook_rot_q") is None
    assert site_from_hookpoint("layers.3.mlp.experts.2") is None
    assert site_from_hookpoint("lm_head") is None
    assert published_name(Site(path="logits")) is None


def test_module_paths_name_what_the_module_returns_or_reads() -> None:
    assert site_from_hookpoint("layers.3") == Site(path="resid.torso.post_mlp", layer=3)
    assert site_from_hookpoint("h.0.attn") == Site(path="resid.torso.delta_attn", layer=0)
    assert site_from_hookpoint("model.layers.7.mlp", of_input=True) == Site(
        path="resid.torso.post_ln_mlp", layer=7
    )
    assert site_from_hookpoint("embed_tokens") == Site(path="emb.tok")


@pytest.mark.parametrize(
    ("path", "read", "written"),
    [
        (
            "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            "resid.torso.post_mlp",
            "resid.torso.post_mlp",
        ),
        (
            "gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_8",
            "resid.torso.delta_mlp",
            "resid.torso.delta_mlp",
        ),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_8", "attn.v_out", "attn.v_out"),
        (
            "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_8",
            "resid.torso.ln_mlp.post_scale",
            "resid.torso.delta_mlp",
        ),
    ],
)
def test_gemma_scope_folders(path: str, read: str, written: str, tmp_path: Path) -> None:
    site_in, site_out, notes = sites_in_path(tmp_path / path, 1)
    layer = 20 if "layer_20" in path else 3
    assert site_in == Site(path=read, layer=layer)
    assert site_out == Site(path=written, layer=layer)
    assert not notes
    assert sites_in_path(tmp_path / "downloads" / "layer_3", 1)[0] is None


def test_embedding_autoencoders_say_what_they_read(tmp_path: Path) -> None:
    site_in, _, notes = sites_in_path(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k", 1)
    assert site_in == Site(path="emb.tok")
    assert "before Gemma's factor" in notes[0]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resid_post_layer_15/trainer_1", 15),
        ("Llama3_1-8B-Base-L15R-8x", 15),
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", 19),
        ("width_16k/average_l0_71", None),
        ("layer_4/average_l0_71", 4),
    ],
)
def test_layers_in_paths(name: str, layer: int | None) -> None:
    assert layer_in_path(Path("/a/b/c/d/e") / name) == layer
