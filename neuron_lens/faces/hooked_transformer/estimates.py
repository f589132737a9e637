"""How sure a number measured on a few examples is: standard errors, intervals, a test by flipping signs."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.interventions.patching_result import sign_flip_pvalues

__all__ = ["bootstrap_ci", "sign_flip_permutation_pvalue", "standard_error", "success_rate_ci"]


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of several values [example], from the unbiased variance."""
    values = _several(values)
    return float(values.std() / len(values) ** 0.5)


def bootstrap_ci(
    values: Tensor, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values [example] (Efron 1979): its low and high end."""
    values = _several(values)
    tail = (1 - _share(confidence)) / 2
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (n_resamples, len(values)), generator=generator)
    ends = values[drawn].mean(-1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def sign_flip_permutation_pvalue(differences: Tensor, n_resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference [example] being 0, by flipping signs (Fisher's randomisation test).

    All sign patterns are tried when they are at most `n_resamples`; else random ones, with the observed one counted in.
    """
    return float(sign_flip_pvalues(_several(differences), resamples=n_resamples, seed=seed))


def success_rate_ci(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a rate (1927): its low and high end.

    Raises RequestError without trials, or with more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise RequestError(
            f"{successes} successes in {trials} trials: expected 0 to trials, and at least one trial"
        )
    z = float(torch.special.ndtri(torch.tensor(0.5 + _share(confidence) / 2, dtype=torch.float64)))
    rate, weight = successes / trials, z * z / trials
    middle = (rate + weight / 2) / (1 + weight)
    half = z * (rate * (1 - rate) / trials + weight / (4 * trials)) ** 0.5 / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def _several(values: Tensor) -> Tensor:
    values = torch.as_tensor(values).detach().cpu().double().flatten()
    if len(values) < 2:
        raise RequestError(f"expected at least two values, one for each example; got {len(values)}")
    return values


def _share(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise RequestError(f"confidence must be between 0 and 1; got {confidence}")
    return confidence
