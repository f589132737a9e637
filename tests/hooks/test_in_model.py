"""The tree in a model: no state outside it, transforms, every site of the table."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import strong_model, tiny_config

from neuron_lens.errors import HookError
from neuron_lens.hooks import (
    AtHeads,
    AtLayers,
    AtPositions,
    AtRows,
    AtUnits,
    AutoencoderHooks,
    TransformerHooks,
)
from neuron_lens.transformer import Transformer

PER_HEAD_INPUTS = ("resid.torso.attn_in", "attn.q_in", "attn.k_in", "attn.v_in")


def present_sites(model: Transformer) -> list[str]:
    absent = model.config.absent_sites()
    return [site.path for site in TransformerHooks().sites() if site.path not in absent]


def test_identity_hooks_change_nothing_bit_for_bit(model: Transformer, tokens: torch.Tensor) -> None:
    """Path by path: a hook that returns what it got gives what a hook that returns None gives, to the last bit."""
    for path in present_sites(model):
        read = TransformerHooks().append_to_path(f"{path}.fwd", lambda x: None)
        written = TransformerHooks().append_to_path(f"{path}.fwd", lambda x: x.clone())
        assert torch.equal(model(tokens, hooks=read), model(tokens, hooks=written)), path
        torch.testing.assert_close(model(tokens, hooks=read), model(tokens), atol=1e-5, rtol=1e-5)


def test_every_declared_site_fires_with_its_declared_shape(model: Transformer, tokens: torch.Tensor) -> None:
    config = model.config
    sizes = {
        "batch": 2, "pos": 10, "key_pos": 10, "head": config.n_heads, "kv_head": config.n_kv_heads, "one": 1,
        "d_head": config.d_head, "d_model": config.d_model, "d_mlp": config.d_mlp, "d_vocab": config.d_vocab,
    }  # fmt: skip
    for group in (PER_HEAD_INPUTS, [p for p in present_sites(model) if p not in PER_HEAD_INPUTS]):
        hooks = TransformerHooks()
        seen: dict[tuple[str, int | None], torch.Size] = {}
        for site in hooks.sites():
            if site.path in group:
                site.append_fwd(
                    lambda x, path=site.path, seen=seen, layer=None: seen.update({(path, layer): x.shape})
                )
        model(tokens, hooks=hooks)
        for site in hooks.sites():
            if site.path in group:
                for layer in range(3) if site.per_layer else [None]:
                    assert seen[site.path, layer] == tuple(sizes[axis] for axis in site.axes), site.path


@pytest.mark.parametrize(
    "path", [p for p in present_sites(strong_model(tiny_config())) if not p.startswith("logits")]
)
def test_every_site_matters(path: str, model: Transformer, tokens: torch.Tensor) -> None:
    """Stretching what stands at a site changes the logits: the site is on the way, not beside it."""

    def stretch(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(x == -torch.inf, -30) * torch.linspace(0.5, 1.5, x.shape[-1])

    with torch.no_grad():
        hooks = TransformerHooks().append_to_path(f"{path}.fwd", stretch)
        moved = float((model(tokens, hooks=hooks) - model(tokens)).abs().max())
    assert moved > 1e-3


@pytest.mark.parametrize(
    "path", ["resid.torso.mlp_in", "resid.torso.post_ln_mlp", "resid.torso.post_ln_attn", "attn.q_in"]
)
def test_in_place_edits_of_a_copy_leave_the_stream_alone(
    path: str, model: Transformer, tokens: torch.Tensor
) -> None:
    in_place = TransformerHooks().append_to_path(f"{path}.fwd", lambda x: x.mul_(2))
    fresh = TransformerHooks().append_to_path(f"{path}.fwd", lambda x: x * 2)
    with torch.no_grad():
        assert torch.equal(model(tokens, hooks=in_place), model(tokens, hooks=fresh))
    unnormed = strong_model(tiny_config(norm="none"))
    with torch.no_grad():
        assert torch.equal(unnormed(tokens, hooks=in_place), unnormed(tokens, hooks=fresh))


def test_two_threads_with_different_trees_on_one_model(model: Transformer, tokens: torch.Tensor) -> None:
    def steered(by: float) -> TransformerHooks:
        return TransformerHooks().append_to_path(
            "resid.torso.post_mlp.fwd", AtLayers(1).append(lambda x: x + by)
        )

    wrong: list[int] = []
    with torch.no_grad():
        expected = {by: model(tokens, hooks=steered(by)) for by in (1.0, -2.0)}

    def worker(by: float) -> None:
        hooks = steered(by)
        for i in range(200):
            with torch.no_grad():
                if not torch.equal(model(tokens, hooks=hooks), expected[by]):
                    wrong.append(i)

    threads = [threading.Thread(target=worker, args=(by,)) for by in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not torch.equal(expected[1.0], expected[-2.0])


def test_an_exception_in_a_hook_leaves_nothing_behind(model: Transformer, tokens: torch.Tensor) -> None:
    before = model(tokens)

    def fails(x: torch.Tensor, layer: int) -> torch.Tensor:
        if layer == 1:
            raise RuntimeError("broken hook")
        return x * 0

    hooks = TransformerHooks().append_to_path("mlp.post_act.fwd", fails)
    with pytest.raises(RuntimeError, match="broken hook"):
        model(tokens, hooks=hooks)
    assert torch.equal(model(tokens), before)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]


def test_recorders_are_never_copied(model: Transformer, tokens: torch.Tensor) -> None:
    class Counter:
        def __init__(self) -> None:
            self.layers: list[int] = []

        def __call__(self, x: torch.Tensor, layer: int) -> None:
            self.layers.append(layer)

        def method(self, x: torch.Tensor, layer: int) -> None:
            self.layers.append(layer)

    counter = Counter()
    hooks = (
        TransformerHooks()
        .append_to_path("mlp.post_act.fwd", counter)
        .append_to_path("attn.q.fwd", counter.method)
    )
    model(tokens, hooks=hooks)
    model(tokens, hooks=hooks)
    assert sorted(counter.layers) == sorted([0, 1, 2] * 4)


def test_only_the_hooked_layer_takes_the_explicit_path(
    model: Transformer, tokens: torch.Tensor, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    explicit = []
    for block in model.blocks:
        original = block.attn.explicit_mix
        monkeypatch.setattr(
            block.attn,
            "explicit_mix",
            lambda *a, o=original, b=block, **k: explicit.append(b.layer) or o(*a, **k),
        )
    model(
        tokens,
        hooks=TransformerHooks().append_to_path("attn.qk_probs.fwd", AtLayers(1).append(lambda x: None)),
    )
    assert explicit == [1]


def test_hooking_head_inputs_and_their_norm_together_is_refused(
    model: Transformer, tokens: torch.Tensor
) -> None:
    hooks = (
        TransformerHooks()
        .append_to_path("attn.q_in.fwd", torch.neg)
        .append_to_path("resid.torso.post_ln_attn.fwd", torch.neg)
    )
    with pytest.raises(HookError, match="cannot be hooked together"):
        model(tokens, hooks=hooks)


def edited_tree(vector: torch.Tensor) -> TransformerHooks:
    """Reads, ablates, steers, and splices an autoencoder."""
    encoder, decoder = ENCODER, DECODER
    ae = AutoencoderHooks(lambda x: torch.relu(x @ encoder), lambda z: z @ decoder, add_error=True)
    ae.latents.append_fwd(AtUnits(3).append(torch.zeros_like))
    return (
        TransformerHooks()
        .append_to_path(
            "resid.torso.post_mlp.fwd", AtLayers(1).append(AtPositions(-1).append(lambda x: x + vector))
        )
        .append_to_path("attn.v_out.fwd", AtHeads(2).append(torch.zeros_like))
        .append_to_path("mlp.post_act.fwd", lambda x, layer: x * 2 if layer == 0 else None)
        .append_to_path("resid.torso.post_attn.fwd", AtLayers(0).append(ae))
        .append_to_path("attn.qk_probs.fwd", lambda x: None)
    )


ENCODER = torch.randn(24, 40, generator=torch.Generator().manual_seed(5)) * 0.3
DECODER = torch.randn(40, 24, generator=torch.Generator().manual_seed(6)) * 0.3


# inductor's first compilation imports modules that torch itself marks as deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend: str, model: Transformer, tokens: torch.Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    hooks = edited_tree(torch.ones(24))
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(tokens, hooks=hooks), model(tokens, hooks=hooks), atol=1e-4, rtol=1e-4
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_changing_a_tensor_argument_does_not_recompile(model: Transformer, tokens: torch.Tensor) -> None:
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        compilations.append(1)
        return graph.forward

    def steered(tokens: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        tree = TransformerHooks().append_to_path("resid.torso.post_mlp.fwd", Steer(vector))
        return model(tokens, hooks=tree)

    class Steer:
        def __init__(self, vector: torch.Tensor) -> None:
            self.vector = vector

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.vector

    steer = Steer(torch.zeros(24))
    hooks = TransformerHooks().append_to_path("resid.torso.post_mlp.fwd", steer)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for scale in (0.0, 1.0, 2.0):
            steer.vector = torch.full((24,), scale)
            torch.testing.assert_close(compiled(tokens, hooks=hooks), steered(tokens, steer.vector))
    assert len(compilations) == 1


def test_vmap_over_a_hooks_tensor_equals_the_loop(model: Transformer, tokens: torch.Tensor) -> None:
    vectors = torch.randn(5, 24)

    def run(vector: torch.Tensor) -> torch.Tensor:
        return model(tokens, hooks=edited_tree(vector))

    with torch.no_grad():
        mapped = torch.func.vmap(run)(vectors)
        torch.testing.assert_close(mapped, torch.stack([run(v) for v in vectors]), atol=1e-5, rtol=1e-5)
    gradient = torch.func.grad(lambda v: run(v).square().mean())(vectors[0])
    assert gradient.abs().max() > 0


def test_one_intervention_a_row_equals_one_forward_each(model: Transformer, tokens: torch.Tensor) -> None:
    row = tokens[:1]
    hooks, alone = TransformerHooks(), []
    for head in range(4):
        ablation = AtLayers(1).append(AtHeads(head).append(torch.zeros_like))
        hooks.append_to_path("attn.v_out.fwd", AtRows(head).append(ablation))
        alone.append(model(row, hooks=TransformerHooks().append_to_path("attn.v_out.fwd", ablation))[0])
    torch.testing.assert_close(
        model(row.expand(4, -1), hooks=hooks), torch.stack(alone), atol=1e-5, rtol=1e-5
    )
