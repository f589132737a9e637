"""Absorption: planted cases are counted to the token, and what is no absorption is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuron_lens.autoencoder_training.absorption import (
    TOKEN_CLASSES,
    ClassAbsorption,
    active_latents,
    measure_absorption,
)

N, D = 1200, 12
CLASS, SUBCLASS, OTHER = 0, 1, 2  # directions of the stream, and latents


def planted(absorbs: bool, narrow: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations, latents, decoder and the class.

    A quarter of the class's tokens belong to a subclass. absorbs: there the subclass's latent, whose decoder row holds
    the class's direction too (`narrow` of it), speaks alone.
    """
    generator = torch.Generator().manual_seed(0)
    belongs = torch.rand(N, generator=generator) < 0.4
    special = belongs & (torch.rand(N, generator=generator) < 0.25)
    other = torch.rand(N, generator=generator) < 0.5
    axes = torch.eye(D)
    x = 5.0 * belongs[:, None] * axes[0] + 4.0 * special[:, None] * axes[1] + 3.0 * other[:, None] * axes[2]
    x = x + 0.3 * torch.randn(N, D, generator=generator)
    latents = torch.zeros(N, 6)
    latents[:, CLASS] = 5.0 * (belongs & ~(special if absorbs else torch.zeros_like(special)))
    latents[:, SUBCLASS] = 5.0 * special
    latents[:, OTHER] = 3.0 * other
    W_dec = torch.zeros(6, D)
    W_dec[CLASS], W_dec[SUBCLASS], W_dec[OTHER] = axes[0], narrow * axes[0] + axes[1], axes[2]
    W_dec[3:] = torch.randn(3, D, generator=generator)
    return x, latents, W_dec, belongs


def measured(x: Tensor, latents: Tensor, W_dec: Tensor, belongs: Tensor) -> ClassAbsorption:
    (found,) = measure_absorption(x, active_latents(latents), W_dec, {"planted": belongs})
    return found


def test_a_planted_absorption_is_counted_to_the_token() -> None:
    x, latents, W_dec, belongs = planted(absorbs=True)
    # the class's latent alone reaches an F1 of 0.86 here; the subclass's would be a second main latent: hide it
    # from the half that main latents are chosen on
    latents[::2, SUBCLASS] = 0
    found = measured(x, latents, W_dec, belongs)
    odd = torch.arange(N) % 2 == 1
    silent = int((belongs & odd & (latents[:, CLASS] == 0)).sum())
    assert found.main_latents == (CLASS,) and found.probe_f1 > 0.99
    assert found.n_tokens == int((belongs & odd).sum())
    assert found.n_found == pytest.approx(found.n_tokens, abs=3)
    assert found.n_missed == pytest.approx(silent, abs=3) and found.n_missed > 40
    assert found.n_absorbed == found.n_missed and found.absorbing_latents == (SUBCLASS,)
    assert found.rate == found.n_absorbed / found.n_found


def test_a_latent_that_does_not_write_along_the_probe_absorbs_nothing() -> None:
    x, latents, W_dec, belongs = planted(absorbs=True, narrow=-1.0)
    latents[::2, SUBCLASS] = 0
    found = measured(x, latents, W_dec, belongs)
    assert found.n_missed > 40
    assert found.n_absorbed < 0.1 * found.n_missed and SUBCLASS not in found.absorbing_latents


def test_where_the_classs_latent_speaks_everywhere_nothing_is_absorbed() -> None:
    found = measured(*planted(absorbs=False))
    assert (found.n_missed, found.n_absorbed, found.absorbing_latents) == (0, 0, ())
    assert found.main_latents == (CLASS,) and found.main_f1 == 1.0


def test_a_class_that_several_latents_share_has_them_all() -> None:
    x, latents, W_dec, belongs = planted(absorbs=True)
    found = measured(x, latents, W_dec, belongs)
    assert found.main_latents == (CLASS, SUBCLASS), "feature splitting is not absorption"
    assert found.n_missed == found.n_absorbed == 0


def test_what_cannot_be_judged_is_left_out() -> None:
    x, latents, W_dec, belongs = planted(absorbs=True)
    few = belongs & (torch.arange(N) < 100)
    noise = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.4  # no probe finds it
    classes = {"few": few, "noise": noise, "all": torch.ones(N, dtype=torch.bool)}
    assert measure_absorption(x, active_latents(latents), W_dec, classes) == ()
    assert measure_absorption(x, active_latents(latents[:, 3:]), W_dec[3:], {"silent": belongs}) == ()


@pytest.mark.parametrize(
    ("token", "classes"),
    [
        (" The", {"capitalised", "word after a space", "begins with t"}),
        ("42", {"digits"}),
        ("),\n", {"punctuation", "line break"}),
        ("\n", {"line break"}),
        ("", set()),
    ],
)
def test_classes_by_hand(token: str, classes: set[str]) -> None:
    assert {name for name, belongs in TOKEN_CLASSES.items() if belongs(token)} == classes
