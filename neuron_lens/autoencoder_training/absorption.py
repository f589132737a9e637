"""Absorption: a latent for a class of tokens that stays silent on some, because narrower latents speak in its place.

The full absorption of Chanin et al. 2024 ("A is for Absorption", section 4), with SAEBench's projection onto a probe
in place of an ablation (Karvonen et al. 2025), and with classes of tokens told by their text:

1. A linear probe is fitted for the class; on tokens it does not know, it must reach an F1 of `MIN_PROBE_F1`.
2. The class's main latents: the one whose firing tells the class best (by F1), and each further one that raises the
   F1 of "any fires" by more than 0.03. Below `MIN_MAIN_F1` the autoencoder has no latents for the class, and nothing
   can be absorbed from them.
3. A token of the class that the probe finds, and on which no main latent fires, is absorbed when the latent that
   writes most along the probe (its size times the projection of its decoder row) has a cosine of at least 0.025 with
   it and writes at least 0.4 of all that is written along it in that direction.

A class that a token's text does not tell, such as a word's sense, is not covered. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

__all__ = ["TOKEN_CLASSES", "ActiveLatents", "ClassAbsorption", "active_latents", "measure_absorption"]

MIN_TOKENS = 40  # of the class, and of the rest
MIN_PROBE_F1 = 0.8
MIN_MAIN_F1 = 0.5
_SPLIT_GAIN = 0.03  # of F1, by which a further main latent must help
_MOST_MAIN = 5
_CANDIDATES = 32
_MIN_COSINE = 0.025
_MIN_SHARE = 0.4

_LETTERS = {f"begins with {letter}": letter for letter in "abcdefghijklmnopqrstuvwxyz"}
TOKEN_CLASSES: dict[str, Callable[[str], bool]] = {
    "digits": lambda token: token.strip().isdigit(),
    "punctuation": lambda token: bool(token.strip()) and not any(c.isalnum() for c in token),
    "capitalised": lambda token: token.strip()[:1].isupper(),
    "line break": lambda token: "\n" in token,
    "word after a space": lambda token: token[:1] == " " and token[1:2].isalpha(),
    **{
        name: lambda token, letter=letter: token.strip()[:1].lower() == letter  # type: ignore[misc]
        for name, letter in _LETTERS.items()
    },
}


class ClassAbsorption(BaseModel):
    """What was found for one class of tokens. Tokens are those the probe was not fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    n_tokens: int  # of the class
    probe_f1: float
    main_latents: tuple[int, ...]
    main_f1: float  # of "a main latent fires", for the class
    n_found: int  # tokens of the class that the probe finds
    n_missed: int  # of those, without a main latent
    n_absorbed: int  # of those, with another latent in its place
    absorbing_latents: tuple[int, ...]  # the most frequent first

    @property
    def rate(self) -> float:
        """Absorbed tokens as a share of those the probe finds."""
        return self.n_absorbed / max(1, self.n_found)


class ActiveLatents(NamedTuple):
    """Which latents fire where, and how strongly: one entry for each that is not zero."""

    token: Tensor  # [entry], int64, ascending
    latent: Tensor  # [entry], int64
    value: Tensor  # [entry]


def active_latents(latents: Tensor) -> ActiveLatents:
    """The entries of dense latents [token, d_latent] that are not zero."""
    token, latent = latents.nonzero(as_tuple=True)
    return ActiveLatents(token, latent, latents[token, latent])


def measure_absorption(
    activations: Tensor, latents: ActiveLatents, W_dec: Tensor, classes: Mapping[str, Tensor]
) -> tuple[ClassAbsorption, ...]:
    """Absorption for each class that the activations tell and that has latents of its own.

    Args:
        activations: [token, d_out], what the autoencoder reconstructs.
        latents: of the same tokens.
        W_dec: [d_latent, d_out].
        classes: name -> which tokens belong to it [token], bool.

    Returns:
        The classes that passed steps 1 and 2 of the module's list; the rest cannot be judged and are left out.
    """
    # every second token fits probes and finds main latents, the others are judged
    fitting = torch.arange(len(activations), device=activations.device) % 2 == 0
    x = activations.double()
    results = []
    whitening = _whitening(x[fitting])
    for name, belongs in classes.items():
        if any(
            int(part.sum()) < MIN_TOKENS
            for half in (fitting, ~fitting)
            for part in (belongs & half, ~belongs & half)
        ):
            continue
        probe, threshold = _probe(x[fitting], belongs[fitting], whitening)
        found = x @ probe > threshold
        probe_f1 = _f1(found[~fitting], belongs[~fitting])
        if probe_f1 < MIN_PROBE_F1:
            continue
        main = _main_latents(latents, belongs & fitting, fitting, len(W_dec))
        fires = _fires(latents, main, len(x))
        main_f1 = _f1(fires[~fitting], belongs[~fitting])
        if main_f1 < MIN_MAIN_F1:
            continue
        right = found & belongs & ~fitting
        absorbing = _absorbing(latents, W_dec.double(), probe, right & ~fires)
        kinds, counts = absorbing.unique(return_counts=True)
        results.append(
            ClassAbsorption(
                name=name,
                n_tokens=int((belongs & ~fitting).sum()),
                probe_f1=probe_f1,
                main_latents=tuple(main),
                main_f1=main_f1,
                n_found=int(right.sum()),
                n_missed=int((right & ~fires).sum()),
                n_absorbed=len(absorbing),
                absorbing_latents=tuple(kinds[counts.argsort(descending=True, stable=True)].tolist()),
            )
        )
    return tuple(results)


def _whitening(x: Tensor) -> Tensor:
    """The inverse of the activations' covariance [d, d], a hundredth of its mean variance added."""
    covariance = x.T.cov(correction=0)
    width = len(covariance)
    ridge = 0.01 * covariance.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.inv(covariance + ridge * torch.eye(width, dtype=x.dtype, device=x.device))


def _probe(x: Tensor, belongs: Tensor, whitening: Tensor) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant: a direction of length 1 [d] and the threshold with the best F1."""
    direction = whitening @ (x[belongs].mean(0) - x[~belongs].mean(0))
    direction = direction / direction.norm()
    scores, order = (x @ direction).sort(descending=True)
    hits = belongs[order].cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(x) + 1, device=x.device) + belongs.sum())
    best = int(f1.argmax())
    after = scores[min(best + 1, len(scores) - 1)]
    return direction, (scores[best] + after) / 2


def _f1(said: Tensor, true: Tensor) -> float:
    return float(2 * (said & true).sum() / (said.sum() + true.sum()).clamp(min=1))


def _main_latents(latents: ActiveLatents, belongs: Tensor, counted: Tensor, d_latent: int) -> list[int]:
    """Greedily, the latents of which "any fires" tells `belongs` best among the tokens counted."""
    fired = latents.latent[counted[latents.token]].bincount(minlength=d_latent)
    hits = latents.latent[belongs[latents.token]].bincount(minlength=d_latent)
    candidates = (2 * hits / (fired + belongs.sum())).topk(min(_CANDIDATES, d_latent)).indices.tolist()
    rows = {latent: _fires(latents, [latent], len(counted)) & counted for latent in candidates}
    main: list[int] = []
    together, best = torch.zeros_like(counted), 0.0
    while len(main) < _MOST_MAIN:
        scores = {latent: _f1(together | row, belongs) for latent, row in rows.items() if latent not in main}
        winner = max(scores, key=lambda latent: scores[latent], default=None)
        if winner is None or (main and scores[winner] - best <= _SPLIT_GAIN):
            break
        main.append(winner)
        together, best = together | rows[winner], scores[winner]
    return main


def _fires(latents: ActiveLatents, which: list[int], n_tokens: int) -> Tensor:
    """On which tokens any of some latents fires [token], bool."""
    entries = torch.isin(latents.latent, torch.tensor(which, device=latents.latent.device))
    fires = torch.zeros(n_tokens, dtype=torch.bool, device=latents.token.device)
    fires[latents.token[entries]] = True
    return fires


def _absorbing(latents: ActiveLatents, W_dec: Tensor, probe: Tensor, missed: Tensor) -> Tensor:
    """The latent that absorbs each missed token, for those that have one [absorbed]."""
    chosen = missed[latents.token]
    token, latent, value = (part[chosen] for part in latents)
    along = W_dec @ probe  # [d_latent]
    written = (value.double() * along[latent]).clamp(min=0)
    total = torch.zeros(len(missed), dtype=written.dtype, device=written.device).index_add(0, token, written)
    most = torch.zeros_like(total).scatter_reduce(0, token, written, "amax")
    cosine = along / W_dec.norm(dim=-1).clamp(min=1e-12)
    strongest = (written == most[token]) & (written > 0)
    absorbs = strongest & (cosine[latent] >= _MIN_COSINE) & (written >= _MIN_SHARE * total[token])
    _, first = torch.unique_consecutive(token[absorbs], return_inverse=True)
    keep = torch.ones_like(first, dtype=torch.bool)
    keep[1:] = first[1:] != first[:-1]  # one latent a token, should two write the same
    return latent[absorbs][keep]
