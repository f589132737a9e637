"""Runs SAELens' public examples: python saelens_peer.py ours|theirs FOLDER OUT.safetensors

"ours" runs them on neuron_lens in the place of transformer_lens, "theirs" on transformer_lens itself; FOLDER keeps the
weights. With "ours" an autoencoder is trained, too, over texts made here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["ours"]:
    from neuron_lens.compat import install_as_transformer_lens

    install_as_transformer_lens()

import torch

SIZES = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 8, "act_fn": "gelu", "device": "cpu", "seed": 0}
STREAM, HEADS = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"


def autoencoders() -> dict[str, Any]:
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig, Transcoder, TranscoderConfig

    common = {"d_in": 16, "d_sae": 40, "device": "cpu"}
    made = {
        "stream": (StandardSAE(StandardSAEConfig(**common)), STREAM, None),
        "heads": (TopKSAE(TopKSAEConfig(**common, k=5, reshape_activations="hook_z")), HEADS, None),
        "transcoder": (
            Transcoder(TranscoderConfig(**common, d_out=16, apply_b_dec_to_input=False)),
            "blocks.1.mlp.hook_in",
            "blocks.1.hook_mlp_out",
        ),
    }
    generator = torch.Generator().manual_seed(4)
    for sae, reads, writes in made.values():
        sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = reads, writes
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return {name: sae for name, (sae, _, _) in made.items()}


def attached(folder: Path) -> dict[str, torch.Tensor]:
    """Everything HookedSAETransformer does with an autoencoder."""
    from sae_lens import HookedSAETransformer
    from safetensors.torch import load_file, save_file
    from transformer_lens import HookedTransformerConfig

    model = HookedSAETransformer(HookedTransformerConfig(**SIZES, d_vocab=50))
    weights = folder / "model.safetensors"
    if not weights.exists():
        generator = torch.Generator().manual_seed(5)
        save_file(
            {
                name: 0.3 * torch.randn(tensor.shape, generator=generator)
                for name, tensor in model.state_dict().items()
                if tensor.is_floating_point() and not name.endswith("IGNORE")
            },
            weights,
        )
    model.load_state_dict(load_file(weights), strict=False)
    tokens = torch.tensor([[5, 17, 33, 2, 48, 9], [11, 3, 3, 47, 8, 30]])
    found = {"plain": model(tokens)}
    for name, sae in autoencoders().items():
        at = sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name
        _, cache = model.run_with_cache(tokens, names_filter=[sae.cfg.metadata.hook_name])
        found[f"{name}/encoded"] = sae.encode(cache[sae.cfg.metadata.hook_name])
        for error in (True, False):
            start = f"{name}/{error}"
            found[f"{start}/logits"] = model.run_with_saes(tokens, saes=[sae], use_error_term=error)
            found[f"{start}/loss"] = model.run_with_saes(
                tokens, saes=sae, use_error_term=error, return_type="loss"
            )
            _, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=error)
            found |= {f"{start}/cache/{key}": value for key, value in cache.items()}
            found[f"{start}/ablated"] = model.run_with_hooks_with_saes(
                tokens, saes=[sae], fwd_hooks=[(f"{at}.hook_sae_acts_post", ablate)]
            )
        model.add_sae(sae)
        with model.hooks(fwd_hooks=[(f"{at}.hook_sae_acts_post", ablate)]):
            found[f"{name}/generated"] = model.generate(
                tokens[:1], max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False
            )
        model.reset_saes()
        found[f"{name}/after"] = model(tokens)
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def ablate(latents: torch.Tensor, hook: Any) -> torch.Tensor:
    latents[..., 3] = 0
    latents[..., 7] += 1.0
    return latents


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The language model runner over texts in memory, and its evaluation."""
    import datasets
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        StandardTrainingSAEConfig,
    )
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from neuron_lens.tokenizers import bytes_tokenizer

    tokenizer = bytes_tokenizer()
    cfg = HookedTransformerConfig(**SIZES, d_vocab=tokenizer.vocab_size)
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    texts = datasets.Dataset.from_list(
        [{"text": f"a text of several words, row {i}. " * 4} for i in range(60)]
    )
    settings = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=16, d_sae=32, l1_coefficient=0.1, device="cpu"),
        model_name="tiny", hook_name=STREAM, dataset_path="texts", is_dataset_tokenized=False, streaming=False,
        context_size=16, training_tokens=1500, store_batch_size_prompts=4, n_batches_in_buffer=4, lr=1e-3,
        train_batch_size_tokens=64, device="cpu", seed=0, logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=str(folder / "checkpoints"), output_path=str(folder / "trained"), verbose=False,
        n_eval_batches=1, eval_batch_size_prompts=2,
    )  # fmt: skip
    runner = LanguageModelSAETrainingRunner(settings, override_model=model, override_dataset=texts)
    sae = runner.run()
    scored, _ = run_evals(
        sae,
        runner.activations_store,
        model,
        ActivationScaler(),
        EvalConfig(
            batch_size_prompts=2,
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
            compute_ce_loss=True,
            compute_kl=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
    )
    numbers = {f"{kind}/{name}": value for kind, row in scored.items() for name, value in row.items()}
    return {f"trained/{name}": torch.tensor(float(value)) for name, value in numbers.items()}


def main(folder: Path, out: str) -> None:
    from safetensors.torch import save_file

    found = attached(folder)
    if sys.argv[1] == "ours":
        found |= trained(folder)
    save_file(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3])
