"""One training step of a top-k autoencoder on a batch of activations, optimiser included, against SAELens' own step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer

TARGETS = {"sae-lens": "at most 0.9"}


def cases(tiny: bool) -> list[Case]:
    """A batch of 8 × 128 activations as wide as GPT-2-small; no latent is dead."""
    if tiny:
        return [Case("tiny", {"d_in": 32, "d_latent": 256, "k": 4, "batch": 16}, tolerance=1e-3)]
    sizes = {"d_in": 768, "d_latent": 24_576, "k": 32, "batch": 1024}
    return [Case("768 → 24,576, k 32, 1,024 tokens", sizes, tolerance=1e-3)]


def prepare(case: Case, folder: Path) -> None:
    """Write the first weights as SAELens reads them."""
    import torch

    from neuron_lens.autoencoders import Autoencoder, save_saelens

    save_saelens(Autoencoder(_config(case), generator=torch.Generator().manual_seed(0)), folder / "sae")


def peers() -> list[Peer]:
    """Ours; the encoder's product, which any step needs; SAELens (its sparse activations have no step on a CPU)."""
    return [
        Peer("neuron_lens", _ours),
        Peer("the encoder's product alone", _product, process="neuron_lens", checked=False),
        Peer("sae-lens", _theirs, environment="sae-lens"),
    ]


def _config(case: Case) -> Any:
    from neuron_lens.autoencoders import AutoencoderConfig

    return AutoencoderConfig(
        d_in=case.sizes["d_in"],
        d_latent=case.sizes["d_latent"],
        activation="topk",
        k=case.sizes["k"],
        input_bias="decoder_bias",
    )


def _batch(case: Case) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.sizes["batch"], case.sizes["d_in"], generator=generator)


def _ours(case: Case, folder: Path) -> Callable[[], Any]:
    from neuron_lens.autoencoder_training import Optimisation, TrainingSettings
    from neuron_lens.autoencoders import load_autoencoder

    settings = TrainingSettings(
        d_latent=case.sizes["d_latent"],
        k=case.sizes["k"],
        n_tokens=10**9,
        batch_tokens=case.sizes["batch"],
        learning_rate=1e-4,
        warm_up=0.0,
    )
    x = _batch(case)
    variance = float((x - x.mean(0)).square().sum(-1).mean())
    step = Optimisation(load_autoencoder(folder / "sae").requires_grad_(True), settings, variance)
    return lambda: {"variance missed": _number(1 - step(x, x)["variance_explained"])}


def _product(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    from neuron_lens.autoencoders import load_autoencoder

    x, sae = _batch(case), load_autoencoder(folder / "sae")
    return torch.no_grad()(lambda: x @ sae.W_enc)


def _theirs(case: Case, folder: Path) -> Callable[[], Any]:
    import torch
    from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sizes = case.sizes
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=sizes["d_in"], d_sae=sizes["d_latent"], k=sizes["k"]))
    sae.load_state_dict(SAE.load_from_disk(str(folder / "sae"), device="cpu").state_dict())
    settings = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=sizes["batch"], lr=1e-4, lr_end=1e-4
    )
    x = _batch(case)
    trainer = SAETrainer(settings, sae, iter(lambda: x, None))
    variance = (x - x.mean(0)).square().sum(-1).mean()

    def step() -> Any:
        done = trainer.step(x)
        trainer.n_training_steps += 1
        with torch.no_grad():
            return {"variance missed": ((x - done.sae_out).square().sum(-1).mean() / variance)[None]}

    return step


def _number(value: float) -> Any:
    import torch

    return torch.tensor([value])
