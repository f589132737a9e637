"""A top-k autoencoder spliced into one site, its error kept: against the products it needs, and against SAELens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, open_transformer_lens, tokens_of, write_gpt2

TARGETS = {
    "forward and two products": "at most 1.05",
    "sae-lens on transformer-lens": "at most 0.6",
}


def cases(tiny: bool) -> list[Case]:
    """The model with the autoencoder at its middle layer, latents unread."""
    if tiny:
        sizes = {"model": TINY, "batch": 2, "pos": 8, "d_latent": 256, "k": 4}
        return [Case("tiny", sizes, tolerance=1e-3)]
    sizes = {"model": SMALL, "batch": 8, "pos": 128, "d_latent": 24_576, "k": 32}
    return [Case("GPT-2 small 8 × 128, 24,576 latents, k 32", sizes, tolerance=1e-3)]


def prepare(case: Case, folder: Path) -> None:
    """Write the model, and the autoencoder as SAELens reads it."""
    import torch

    from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site, save_saelens

    write_gpt2(case.sizes["model"], folder)
    site = Site(path="resid.torso.post_mlp", layer=_layer(case))
    config = AutoencoderConfig(
        d_in=case.sizes["model"]["n_embd"],
        d_latent=case.sizes["d_latent"],
        activation="topk",
        k=case.sizes["k"],
        input_bias="decoder_bias",
        site_in=site,
        model_name="gpt2",
    )
    save_saelens(Autoencoder(config, generator=torch.Generator().manual_seed(0)), folder / "sae")


def peers() -> list[Peer]:
    """Ours; what cannot be saved (the model and the encoder's product, or both products, dense); SAELens."""
    return [
        Peer("neuron_lens", _ours),
        Peer("forward alone", lambda case, folder: _products(case, folder, 0), process="neuron_lens"),
        Peer(
            "forward and one product", lambda case, folder: _products(case, folder, 1), process="neuron_lens"
        ),
        Peer(
            "forward and two products", lambda case, folder: _products(case, folder, 2), process="neuron_lens"
        ),
        Peer("sae-lens on transformer-lens", _theirs, environment="sae-lens"),
    ]


def _layer(case: Case) -> int:
    return int(case.sizes["model"]["n_layer"]) // 2


def _tokens(case: Case) -> Any:
    return tokens_of(case.sizes["model"], case.sizes["batch"], case.sizes["pos"])


def _ours(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    from neuron_lens.autoencoders import load_autoencoder, splice
    from neuron_lens.hooks import TransformerHooks

    model, tokens, hooks = open_ours(folder), _tokens(case), TransformerHooks()
    splice(hooks, load_autoencoder(folder / "sae"))
    return torch.no_grad()(lambda: model(tokens, hooks=hooks))


def _products(case: Case, folder: Path, count: int) -> Callable[[], Any]:
    import torch

    from neuron_lens.autoencoders import load_autoencoder
    from neuron_lens.hooks import AtLayers, TransformerHooks

    model, tokens, hooks = open_ours(folder), _tokens(case), TransformerHooks()
    sae = load_autoencoder(folder / "sae")

    def multiply(x: Any) -> None:
        if count > 0:
            latents = x @ sae.W_enc
            if count > 1:
                _ = latents @ sae.W_dec

    hooks.append_to_path("resid.torso.post_mlp.fwd", AtLayers(_layer(case)).append(multiply))
    return torch.no_grad()(lambda: model(tokens, hooks=hooks))


def _theirs(case: Case, folder: Path) -> Callable[[], Any]:
    import torch
    from sae_lens import SAE, HookedSAETransformer

    model = open_transformer_lens(folder, HookedSAETransformer)
    model.add_sae(SAE.load_from_disk(str(folder / "sae"), device="cpu"), use_error_term=True)
    tokens = _tokens(case)
    return torch.no_grad()(lambda: model(tokens))
