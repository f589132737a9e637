"""Runs analyses of the kind courses teach: python course_peer.py ours|theirs FOLDER OUT.safetensors

"ours" runs them on neuron_lens in the place of transformer_lens, "theirs" on transformer_lens itself. FOLDER holds a
Hugging Face model, from which the weights come.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["ours"]:
    from neuron_lens.compat import install_as_transformer_lens

    install_as_transformer_lens()

import torch
import transformer_lens.utils as utils
from torch import Tensor
from transformer_lens import (
    ActivationCache,
    FactoredMatrix,
    HookedTransformer,
    HookedTransformerConfig,
    patching,
)
from transformer_lens.hook_points import HookPoint

CLEAN = torch.tensor([[5, 17, 33, 2, 48, 9, 21, 17], [11, 3, 40, 57, 8, 30, 22, 3]])
CORRUPTED = torch.tensor([[5, 18, 33, 2, 48, 9, 21, 18], [11, 4, 40, 57, 8, 30, 22, 4]])
ANSWERS = torch.tensor([[7, 12], [44, 6]])  # right, wrong


def logit_difference(logits: Tensor, answers: Tensor = ANSWERS) -> Tensor:
    last = logits[:, -1].gather(-1, answers)
    return (last[:, 0] - last[:, 1]).mean()


def direct_logit_attribution(model: HookedTransformer) -> dict[str, Tensor]:
    logits, cache = model.run_with_cache(CLEAN)
    assert isinstance(cache, ActivationCache)
    directions = model.tokens_to_residual_directions(ANSWERS)
    difference = directions[:, 0] - directions[:, 1]
    final = cache["resid_post", -1][:, -1, :]
    scaled = cache.apply_ln_to_stack(final, layer=-1, pos_slice=-1)
    found = {"average": (scaled * difference).sum(-1).mean(), "original": logit_difference(logits)}
    streams, _ = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1, return_labels=True)
    found["lens"] = (cache.apply_ln_to_stack(streams, layer=-1, pos_slice=-1) * difference).sum(-1).mean(-1)
    layers, _ = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
    found["layers"] = (cache.apply_ln_to_stack(layers, layer=-1, pos_slice=-1) * difference).sum(-1).mean(-1)
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    heads = cache.apply_ln_to_stack(heads, layer=-1, pos_slice=-1)
    found["heads"] = (heads * difference).sum(-1).mean(-1).reshape(model.cfg.n_layers, model.cfg.n_heads)
    return found


def activation_patching(model: HookedTransformer) -> dict[str, Tensor]:
    """Heat maps, by hand with hooks and by the library's functions."""
    _, clean = model.run_with_cache(CLEAN)

    def patch_position(x: Tensor, hook: HookPoint, pos: int, cache: Any) -> Tensor:
        x[:, pos, :] = cache[hook.name][:, pos, :]
        return x

    def patch_head(x: Tensor, hook: HookPoint, head: int, cache: Any) -> Tensor:
        x[:, :, head, :] = cache[hook.name][:, :, head, :]
        return x

    stream = torch.zeros(model.cfg.n_layers, CLEAN.shape[1])
    heads = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for pos in range(CLEAN.shape[1]):
            hook = (utils.get_act_name("resid_pre", layer), partial(patch_position, pos=pos, cache=clean))
            stream[layer, pos] = logit_difference(model.run_with_hooks(CORRUPTED, fwd_hooks=[hook]))
        for head in range(model.cfg.n_heads):
            hook = (utils.get_act_name("z", layer, "attn"), partial(patch_head, head=head, cache=clean))
            heads[layer, head] = logit_difference(
                model.run_with_hooks(CORRUPTED, fwd_hooks=[hook], return_type="logits")
            )
    found = {"stream": stream, "heads": heads}
    found["every_block"] = patching.get_act_patch_block_every(model, CORRUPTED, clean, logit_difference)
    found["head_out"] = patching.get_act_patch_attn_head_out_all_pos(
        model, CORRUPTED, clean, logit_difference
    )
    return found


def path_patching(model: HookedTransformer) -> dict[str, Tensor]:
    """One head's output into the values of later heads only: three passes, the rest frozen."""
    _, clean = model.run_with_cache(CLEAN)
    _, corrupted = model.run_with_cache(CORRUPTED)

    def freeze(z: Tensor, hook: HookPoint, sender: tuple[int, int]) -> Tensor:
        z[...] = corrupted[hook.name][...]
        if hook.layer() == sender[0]:
            z[:, :, sender[1]] = clean[hook.name][:, :, sender[1]]
        return z

    def receive(v: Tensor, hook: HookPoint, kept: Any, head: int) -> Tensor:
        v[:, :, head] = kept[hook.name][:, :, head]
        return v

    found = torch.zeros(model.cfg.n_heads)
    receiver = utils.get_act_name("v", 2)
    for head in range(model.cfg.n_heads):
        model.reset_hooks()
        model.add_hook(lambda name: name.endswith("hook_z"), partial(freeze, sender=(0, head)))
        _, kept = model.run_with_cache(CORRUPTED, names_filter=lambda name: name == receiver)
        model.reset_hooks()
        hooks = [(receiver, partial(receive, kept=kept, head=1))]
        found[head] = logit_difference(model.run_with_hooks(CORRUPTED, fwd_hooks=hooks))
    return {"into_values": found}


def induction(model: HookedTransformer) -> dict[str, Tensor]:
    """Scores of heads that look behind the earlier copy of a token, collected by a hook on every pattern."""
    length = 7
    once = torch.randint(0, 60, (3, length), generator=torch.Generator().manual_seed(2))
    repeated = torch.cat((once, once), -1)
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)

    def score(pattern: Tensor, hook: HookPoint) -> None:
        scores[hook.layer()] = pattern.diagonal(offset=1 - length, dim1=-2, dim2=-1).mean((0, -1))

    is_pattern = lambda name: name.endswith("pattern")  # noqa: E731 - as such code is written
    loss = model.run_with_hooks(
        repeated, return_type="loss", loss_per_token=True, fwd_hooks=[(is_pattern, score)]
    )
    logits = model(repeated)
    found = {"scores": scores, "loss": loss, "accuracy": utils.lm_accuracy(logits, repeated)}
    found["mean"] = utils.lm_cross_entropy_loss(logits, repeated)
    return found


def ablation(model: HookedTransformer) -> dict[str, Tensor]:
    def ablate(z: Tensor, hook: HookPoint, head: int) -> Tensor:
        z[:, :, head, :] = 0.0
        return z

    found = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", partial(ablate, head=head))]):
                found[layer, head] = model(CLEAN, return_type="loss")
    return {"loss": found}


def attribution_patching(model: HookedTransformer) -> dict[str, Tensor]:
    """Gradients kept by backward hooks, times the difference of two runs."""
    model.reset_hooks()
    forward: dict[str, Tensor] = {}
    backward: dict[str, Tensor] = {}
    wanted = lambda name: "hook_z" in name or "resid_pre" in name  # noqa: E731

    def keep(x: Tensor, hook: HookPoint, into: dict[str, Tensor]) -> None:
        into[hook.name] = x.detach()

    model.add_hook(wanted, partial(keep, into=forward), "fwd")
    model.add_hook(wanted, partial(keep, into=backward), "bwd")
    with torch.enable_grad():
        value = logit_difference(model(CORRUPTED))
        value.backward()
    model.reset_hooks()
    cache, gradients = ActivationCache(forward, model), ActivationCache(backward, model)
    _, clean = model.run_with_cache(CLEAN)
    effect = {name: (gradients[name] * (clean[name] - cache[name])).sum((0, -1)) for name in sorted(forward)}
    return effect


def circuits(model: HookedTransformer) -> dict[str, Tensor]:
    """Weights taken apart: the whole OV circuit, its eigenvalues, positions seen by the first layer, composition."""
    full = model.embed.W_E @ model.OV @ model.unembed.W_U
    assert isinstance(full, FactoredMatrix)
    values = full.eigenvalues
    found = {"copying": values.sum(-1).real / values.abs().sum(-1), "corner": full[0, 1, :5, :5].AB}
    previous = model.W_pos @ model.QK[0, 2] @ model.W_pos.T
    found["positions"] = (
        utils.get_corner(previous.AB, 6) if isinstance(previous, FactoredMatrix) else previous
    )
    found["composition"] = model.all_composition_scores("K")
    return found


def own_model() -> dict[str, Tensor]:
    """A model from a configuration, stepped by an optimiser, with parts called one after another."""
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=8, d_head=4, n_heads=4, d_vocab=11, attn_only=True, seed=3, device="cpu",
        init_weights=True, normalization_type="LN",
    )  # fmt: skip
    model = HookedTransformer(cfg)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(0.02 * (number % 3))
        model.embed.W_E.copy_(torch.linspace(-1, 1, 11 * 16).reshape(11, 16))
        model.unembed.W_U.copy_(torch.linspace(1, -1, 11 * 16).reshape(16, 11) ** 2)
    tokens = torch.arange(7)[None]
    stream = model.embed(tokens) + model.pos_embed(tokens)
    stream = model.blocks[0](stream)
    return {"by_parts": model.unembed(model.ln_final(stream)), "whole": model(tokens)}


def build(folder: Path) -> HookedTransformer:
    if sys.argv[1] == "ours":
        model = HookedTransformer.from_pretrained(str(folder))
    else:
        from transformer_lens_peer import build as build_theirs

        model = build_theirs("gpt2", str(folder), processed=True)
    model.eval()
    return model


def main(folder: Path, out: str) -> None:
    from safetensors.torch import save_file

    model = build(folder)
    torch.set_grad_enabled(False)
    found: dict[str, Tensor] = {}
    for analysis in (
        direct_logit_attribution, activation_patching, path_patching, induction, ablation, attribution_patching,
        circuits,
    ):  # fmt: skip
        found |= {f"{analysis.__name__}/{name}": value for name, value in analysis(model).items()}
    found |= {f"own_model/{name}": value for name, value in own_model().items()}
    save_file({name: value.detach().clone().contiguous() for name, value in found.items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3])
