"""What all tests share: small random models, and one thread, so that sums come out the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from neuron_lens.transformer import Transformer, TransformerConfig

# examples are few and untimed: machines are slow and noisy, laws are not
settings.register_profile(
    "default", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny_config(**changes: object) -> TransformerConfig:
    """A GPT-2-like configuration small enough to run in a millisecond."""
    fields: dict[str, object] = {
        "n_layers": 3,
        "d_model": 24,
        "n_heads": 4,
        "d_mlp": 48,
        "d_vocab": 50,
        "n_ctx": 32,
    }
    return TransformerConfig(**{**fields, **changes})


def strong_model(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A random model whose weights are large enough for every part to matter."""
    model = Transformer(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="session")
def model() -> Transformer:
    """A tiny GPT-2-like model. Shared: tests must not change it."""
    return strong_model(tiny_config())


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of ten ids, [batch, pos]."""
    return torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(1))
