"""What a run folder keeps of an autoencoder or a direction is that, to the bit; anything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site
from neuron_lens.errors import RequestError
from neuron_lens.explain.kept_sources import KeptSources, kept_path, open_kept
from neuron_lens.explain.recipe import Recipe
from neuron_lens.harvest.sources import Direction, dictionary_of

NONE = Recipe(model="m")
SITE = Site(path="resid.torso.post_mlp", layer=1)


def written(folder: Path, *held: Autoencoder | Direction) -> Recipe:
    """The recipe of a folder that keeps these."""
    autoencoders = {dictionary_of(each): each for each in held if isinstance(each, Autoencoder)}
    directions = [each for each in held if isinstance(each, Direction)]
    kept = KeptSources(autoencoders, directions)
    recipe = kept.added(NONE, {*autoencoders, *(each.dictionary for each in directions)})
    kept.write(folder, recipe)
    assert recipe is not None
    return Recipe.model_validate_json(recipe.model_dump_json())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "relu", "input_bias": "own"},
        {"activation": "topk", "k": 3, "input_bias": "decoder_bias", "decoder_norm": "scale_latents"},
        {"activation": "batch_topk", "k": 3, "group_sizes": (6, 6)},
        {"activation": "jumprelu", "relu_after_selection": False},
        {"activation": "gated", "normalisation": "layer_norm"},
        {"activation": "groupmax", "k": 4, "normalisation": "scale", "scale_in": 1.7, "scale_out": 0.3},
        {
            "activation": "topk",
            "k": 3,
            "has_skip": True,
            "site_out": Site(path="resid.torso.delta_mlp", layer=1),
        },
    ],
)
def test_every_autoencoder_comes_back_to_the_bit(
    fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    config = AutoencoderConfig(d_in=8, d_latent=12, site_in=SITE, **fields)
    own = Autoencoder(config, dtype=dtype, generator=torch.Generator().manual_seed(3)).eval()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)).to(dtype))
    (noted,) = written(tmp_path, own).sources
    found = open_kept(tmp_path, noted)
    assert isinstance(found, Autoencoder) and noted.dictionary == dictionary_of(own) == dictionary_of(found)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        assert torch.equal(found.encode(x), own.encode(x)) and torch.equal(found(x), own(x))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9).filter(
        lambda v: any(abs(x) > 1e-3 for x in v)
    )
)
def test_a_direction_comes_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    own = Direction("up", torch.tensor(values), "resid.torso.post_attn", 2)
    (noted,) = written(folder, own).sources
    found = open_kept(folder, noted)
    assert isinstance(found, Direction) and torch.equal(found.vector, own.vector)
    assert (found.name, found.site, found.layer) == (own.name, own.site, own.layer)
    assert found.dictionary == own.dictionary


def test_a_folder_keeps_what_is_used_once_and_mends_what_is_damaged(tmp_path: Path) -> None:
    up, down = (Direction(name, torch.ones(4), "mlp.pre_act", 0) for name in ("up", "down"))
    kept = KeptSources({}, [up, down])
    recipe = kept.added(NONE, {up.dictionary})
    assert recipe is not None and [one.name for one in recipe.sources] == ["up"]
    assert kept.added(recipe, {up.dictionary}) == recipe and kept.added(None, {up.dictionary}) is None
    kept.write(tmp_path, recipe)
    path = kept_path(tmp_path, recipe.sources[0])
    assert [path] == list(path.parent.iterdir())
    whole, stamp = path.read_bytes(), path.stat().st_mtime_ns
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable by whom the folder is for
    kept.write(tmp_path, recipe)
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(whole[:-1])
    with pytest.raises(RequestError, match="damaged or another's"):
        open_kept(tmp_path, recipe.sources[0])
    kept.write(tmp_path, recipe)
    assert path.read_bytes() == whole


def test_another_file_in_the_place_of_one_is_refused(tmp_path: Path) -> None:
    recipe = written(
        tmp_path, *(Direction(name, torch.eye(3)[i], "mlp.pre_act", 0) for i, name in enumerate("ab"))
    )
    first, second = recipe.sources
    kept_path(tmp_path, first).write_bytes(kept_path(tmp_path, second).read_bytes())
    with pytest.raises(RequestError, match=f"is not the direction {first.dictionary}"):
        open_kept(tmp_path, first)
    kept_path(tmp_path, first).unlink()
    with pytest.raises(RequestError, match="is not there"):
        open_kept(tmp_path, first)
