"""Neurons and latents as nodes: parts add up, edges into and out of them are exact, attribution agrees where it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site
from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions import (
    Ablation,
    Circuit,
    Freeze,
    GraphShape,
    LogitDifference,
    Patch,
    Units,
    attribute_edges,
    capture,
    exact_edge_effects,
    run_circuit,
    score_circuit,
    to_hooks,
)
from neuron_lens.interventions.circuits import sender_outputs
from neuron_lens.transformer import Transformer
from tests.interventions.models import FAMILIES, prompts, tiny_model

METRIC = LogitDifference(3, 5)
STREAM, MLP_OUT, MLP_READ = "resid.torso.post_mlp", "resid.torso.delta_mlp", "resid.torso.post_ln_mlp"


def autoencoder(read: str, write: str, layer: int, **changes: Any) -> Autoencoder:
    sizes: dict[str, Any] = {"d_in": 16, "d_latent": 20, "activation": "relu"}
    sites = {"site_in": Site(path=read, layer=layer), "site_out": Site(path=write, layer=layer)}
    made = Autoencoder(
        AutoencoderConfig(**{**sizes, **sites, **changes}), generator=torch.Generator().manual_seed(layer)
    )
    return made.requires_grad_(False)


AUTOENCODERS = {
    "stream": autoencoder(STREAM, STREAM, 1),
    "topk": autoencoder(STREAM, STREAM, 2, activation="topk", k=5, normalisation="layer_norm"),
    "out": autoencoder(MLP_OUT, MLP_OUT, 2),
    "transcoder": autoencoder(MLP_READ, MLP_OUT, 0, has_skip=True),
}
KINDS = {
    "neurons": [Units.neurons(0, (3, 17)), Units.neurons(2, (5,))],
    "stream": [Units.latents("stream", AUTOENCODERS["stream"], (1, 7, 12))],
    "topk": [Units.latents("topk", AUTOENCODERS["topk"], range(20))],
    "both places": [Units.neurons(1, (2, 9)), Units.latents("stream", AUTOENCODERS["stream"], (3, 4))],
    "out": [Units.latents("out", AUTOENCODERS["out"], (0, 19)), Units.neurons(1, (2, 4))],
    "transcoder": [
        Units.latents("transcoder", AUTOENCODERS["transcoder"], (2, 3)),
        Units.latents("stream", AUTOENCODERS["stream"], (0, 4)),
    ],
}


def model_of(family: str) -> Transformer:
    """A tiny model whose norms have weights of their own."""
    gemma = {"norm": "rms", "norm_offset": True} if family == "sandwich" else {}
    model = tiny_model(family, **gemma)
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and name.endswith(".weight"):
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    return model


def shape_of(model: Transformer, kind: str) -> GraphShape:
    return GraphShape.of(model.config, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_senders_write_adds_up_to_the_stream_but_for_what_is_the_same_in_all_runs(
    kind: str, family: str
) -> None:
    model = model_of(family)
    shape = shape_of(model, kind)
    found = []
    for tokens in (prompts(seed=1), prompts(seed=2)):
        written = sender_outputs(model, tokens, shape=shape, autoencoders=AUTOENCODERS)
        assert len(written) == len(shape.senders)
        found.append(capture(model, tokens, STREAM)[STREAM, 2] - written.sum(0))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[0], found[0][:1, :1].expand_as(found[0]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_are_the_model_and_none_the_other_run(kind: str, family: str) -> None:
    model, tokens, others = model_of(family), prompts(seed=1), prompts(seed=2)
    every = Circuit(shape_of(model, kind))
    patch, with_them = Ablation("patch", others), {"autoencoders": AUTOENCODERS}
    whole = run_circuit(model, tokens, every, patch, METRIC, **with_them)
    torch.testing.assert_close(whole, METRIC(model(tokens), tokens), atol=2e-5, rtol=1e-4)
    # keeping what leads into units, but nothing that leaves them, changes nothing either
    into = [index for index, port in enumerate(every.shape.receivers) if port.unit is not None]
    kept = torch.zeros_like(every.kept)
    kept[:, into] = every.kept[:, into]
    for circuit in (every.complement(), Circuit(every.shape, None, kept)):
        nothing = run_circuit(model, tokens, circuit, patch, METRIC, **with_them)
        torch.testing.assert_close(nothing, METRIC(model(others), others), atol=3e-5, rtol=1e-4)


def by_node(shape: GraphShape, name: str) -> tuple[int, list[int]]:
    senders = [node.name for node in shape.senders]
    return senders.index(name), shape.fed_by[senders.index(name)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "parallel", "post", "sandwich"])
def test_cutting_all_edges_of_a_neuron_is_patching_it(family: str) -> None:
    # its activation reaches everything through the stream alone; behind a norm the norm's divisor is held
    model, tokens, others = model_of(family), prompts(seed=1), prompts(seed=2)
    latents = Units.latents("stream", AUTOENCODERS["stream"], (3, 4))
    shape = GraphShape.of(model.config, [Units.neurons(1, (2, 4)), latents])
    sender, _ = by_node(shape, "neuron 1.4")
    assert all(bool(shape.possible[sender, by_node(shape, node.name)[1]]) for node in latents.nodes())
    kept = shape.possible.clone()
    kept[sender] = False
    ablation, options = Ablation("patch", others), {"autoencoders": AUTOENCODERS}
    cut = run_circuit(model, tokens, Circuit(shape, None, kept), ablation, METRIC, **options)
    if model.config.norm_place == "pre":
        source = capture(model, others, "mlp.post_act")
        patch = to_hooks(Patch(site="mlp.post_act", layers=1, units=4, source=source), model)
    else:
        # its share of what the MLP adds, in either run: it is written where the norm has scaled it
        runs = [sender_outputs(model, one, shape=shape, **options)[sender] for one in (others, tokens)]
        difference = runs[0] - runs[1]
        patch = TransformerHooks().append_to_path(
            f"{MLP_OUT}.fwd", AtLayers(1).append(lambda x: x + difference)
        )
    torch.testing.assert_close(cut, METRIC(model(tokens, hooks=patch), tokens), atol=3e-5, rtol=1e-4)


def test_cutting_all_edges_into_a_neuron_gives_it_the_other_runs_activation() -> None:
    model, tokens, others = tiny_model("llama"), prompts(seed=1), prompts(seed=2)
    shape = GraphShape.of(model.config, [Units.neurons(1, (2, 4))])
    _, ports = by_node(shape, "neuron 1.4")
    kept = shape.possible.clone()
    kept[:, ports] = False
    cut = run_circuit(model, tokens, Circuit(shape, None, kept), Ablation("patch", others), METRIC)
    source = capture(model, others, "mlp.post_act")
    patch = to_hooks(Patch(site="mlp.post_act", layers=1, units=4, source=source), model)
    torch.testing.assert_close(cut, METRIC(model(tokens, hooks=patch), tokens), atol=3e-5, rtol=1e-4)


def test_cutting_all_edges_into_the_rest_of_an_mlp_leaves_its_neurons() -> None:
    model, tokens, others = tiny_model("llama"), prompts(seed=1), prompts(seed=2)
    shape = GraphShape.of(model.config, [Units.neurons(1, (2, 4))])
    _, ports = by_node(shape, "mlp 1")
    kept = shape.possible.clone()
    kept[:, ports] = False
    cut = run_circuit(model, tokens, Circuit(shape, None, kept), Ablation("patch", others), METRIC)
    source = capture(model, others, "mlp.post_act")
    rest = [unit for unit in range(24) if unit not in (2, 4)]
    patch = to_hooks(Patch(site="mlp.post_act", layers=1, units=rest, source=source), model)
    torch.testing.assert_close(cut, METRIC(model(tokens, hooks=patch), tokens), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["stream", "out", "transcoder", "topk"])
def test_cutting_a_latent_moves_the_stream_along_its_direction(kind: str) -> None:
    model, tokens, others = tiny_model(), prompts(seed=1), prompts(seed=2)
    shape = shape_of(model, kind)
    units = shape.units[0]
    made = AUTOENCODERS[kind]
    layer, unit = units.layer, units.indices[-1]
    sender, ports = by_node(shape, f"latent {kind} {layer}.{unit}")
    read, write = made.config.site_in.path, made.config.site_out.path

    def contribution(prompt: Tensor) -> Tensor:
        x = capture(model, prompt, read)[read, layer]
        latents, state = made.encode_with_state(x)
        one = torch.zeros_like(latents)
        one[..., unit] = latents[..., unit]
        # the state's offset and the biases are in both
        return made.decode(one, state) - made.decode(torch.zeros_like(one), state)

    difference = contribution(others) - contribution(tokens)
    hooks = TransformerHooks().append_to_path(
        f"{write}.fwd", AtLayers(layer).append(lambda x: x + difference)
    )
    expected = METRIC(model(tokens, hooks=hooks), tokens)
    for rows, columns in ((sender, slice(None)), (slice(None), ports)):
        kept = shape.possible.clone()
        kept[rows, columns] = False
        cut = run_circuit(
            model,
            tokens,
            Circuit(shape, None, kept),
            Ablation("patch", others),
            METRIC,
            autoencoders=AUTOENCODERS,
        )
        torch.testing.assert_close(cut, expected, atol=3e-5, rtol=1e-3)
    assert float(difference.abs().max()) > 1e-3 or kind == "topk"


@pytest.mark.parametrize("kind", ["neurons", "stream", "out"])
@pytest.mark.parametrize("method", ["gradient", "integrated_inputs", "integrated_activations"])
def test_attribution_is_exact_where_the_model_is_linear(kind: str, method: str) -> None:
    # no norms, patterns held, and every neuron and latent far above the kink of its rectifier
    model = tiny_model(norm="none", activation="relu", n_layers=3).double()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.up.bias.add_(500.0)
            block.mlp.down.bias.sub_(500.0 * block.mlp.down.weight.sum(1))  # what that adds, taken off again
    autoencoders = {
        name: Autoencoder(AUTOENCODERS[name].config, dtype=torch.float64) for name in ("stream", "out")
    }
    for name, made in autoencoders.items():
        made.load_state_dict(AUTOENCODERS[name].state_dict())
        made.b_enc.data.add_(50_000.0)
    tokens, others = prompts(seed=1), prompts(seed=2)
    held = to_hooks(Freeze(site="attention_pattern", source=capture(model, tokens, "attn.qk_probs")), model)
    options: dict[str, Any] = {"autoencoders": autoencoders, "hooks": held}
    ablation = Ablation("patch", others)
    found = attribute_edges(
        model, tokens, ablation, METRIC, method=method, steps=2, units=KINDS[kind], **options
    )
    of_units = torch.tensor([node.unit is not None for node in found.shape.senders])[:, None]
    into_units = torch.tensor([port.unit is not None for port in found.shape.receivers])
    some = (of_units | into_units) & (torch.arange(found.kept.numel()).view(found.kept.shape) % 5 == 0)
    exact = exact_edge_effects(model, tokens, ablation, METRIC, Circuit(found.shape, None, some), **options)
    largest = float(exact.scores.abs().max())
    assert largest > 1e-3
    torch.testing.assert_close(
        found.scores[exact.kept], exact.scores[exact.kept], atol=1e-5 * largest, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["neurons", "stream", "out", "transcoder"])
@pytest.mark.parametrize("method", ["gradient", "integrated_inputs", "integrated_activations"])
def test_attribution_is_exact_in_the_limit_of_a_small_difference(kind: str, method: str) -> None:
    model = tiny_model("sandwich" if kind == "neurons" else "gpt2").double()
    autoencoders = {
        name: Autoencoder(made.config, dtype=torch.float64) for name, made in AUTOENCODERS.items()
    }
    for name, made in autoencoders.items():
        made.load_state_dict(AUTOENCODERS[name].state_dict())
    with torch.no_grad():  # two tokens that hardly differ
        model.embed.weight[1] = model.embed.weight[0] + 1e-2 * model.embed.weight[2]
    tokens, others = prompts(seed=1), prompts(seed=1).clone()
    tokens[:, 2], others[:, 2] = 0, 1
    options: dict[str, Any] = {"autoencoders": autoencoders}
    ablation = Ablation("patch", others)
    found = attribute_edges(
        model, tokens, ablation, METRIC, method=method, steps=2, units=KINDS[kind], **options
    )
    of_units = torch.tensor([node.unit is not None for node in found.shape.senders])[:, None]
    into_units = torch.tensor([port.unit is not None for port in found.shape.receivers])
    some = (of_units | into_units) & (torch.arange(found.kept.numel()).view(found.kept.shape) % 7 == 0)
    exact = exact_edge_effects(model, tokens, ablation, METRIC, Circuit(found.shape, None, some), **options)
    largest = float(exact.scores.abs().max())
    assert largest > 2e-5, (
        "norms and softmaxes are in float32: differences of the metric are good to about 1e-7"
    )
    worst = float((found.scores - exact.scores)[exact.kept].abs().max())
    assert worst < 0.03 * largest


def test_scores_of_units_part_those_of_their_mlp() -> None:
    # an MLP's edges are the sum of those of its neurons and of the rest, both ways, when nothing else changes
    model, tokens, others = tiny_model("llama"), prompts(seed=1), prompts(seed=2)
    ablation = Ablation("patch", others)
    whole = attribute_edges(model, tokens, ablation, METRIC)
    split = attribute_edges(model, tokens, ablation, METRIC, units=[Units.neurons(1, range(10))])

    def total(circuit: Circuit, *, out: bool) -> Tensor:
        parts = ("mlp", "neuron")
        if out:
            rows = [i for i, n in enumerate(circuit.shape.senders) if n.part in parts and n.layer == 1]
            columns = [i for i, p in enumerate(circuit.shape.receivers) if p.unit is None]
            return circuit.scores[rows][:, columns].sum(0)
        columns = [i for i, p in enumerate(circuit.shape.receivers) if p.reads in parts and p.layer == 1]
        rows = [i for i, n in enumerate(circuit.shape.senders) if n.unit is None]
        return circuit.scores[rows][:, columns].sum(1)

    for out in (True, False):
        torch.testing.assert_close(total(split, out=out), total(whole, out=out), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_circuits_with_units_are_scored_stored_and_loaded(kind: str, tmp_path: Any) -> None:
    model, tokens, others = tiny_model("sandwich"), prompts(seed=1), prompts(seed=2)
    options = {"autoencoders": AUTOENCODERS}
    every = attribute_edges(model, tokens, Ablation("zero"), METRIC, units=KINDS[kind], **options)
    circuit = every.greedy(40)
    circuit.save(tmp_path / "circuit.json")
    loaded = Circuit.load(tmp_path / "circuit.json")
    assert loaded == circuit and loaded.shape.units == tuple(KINDS[kind])
    for ablation in (Ablation("zero"), Ablation("mean", others), Ablation("resample", others, seed=1)):
        ends = score_circuit(model, tokens, Circuit(every.shape), ablation, METRIC, **options)
        assert ends.faithfulness == pytest.approx(1) and ends.completeness == pytest.approx(1)
        score = score_circuit(model, tokens, loaded, ablation, METRIC, **options)
        assert score == score_circuit(model, tokens, circuit, ablation, METRIC, **options)
        assert score.whole == ends.whole and score.empty == ends.empty


def test_units_that_make_no_sense_are_refused() -> None:
    model, tokens = tiny_model(), prompts()
    for units, said in (
        ([Units.neurons(0, (24,))], "neuron 24 does not exist"),
        ([Units.neurons(3, (0,))], "the model has 3"),
        ([Units.neurons(1, (0,)), Units.neurons(1, (2,))], "one part is split one way"),
    ):
        with pytest.raises(RequestError, match=said):
            GraphShape.of(model.config, units)
    with pytest.raises(RequestError, match="different whole numbers"):
        Units.neurons(0, (1, 1))
    with pytest.raises(RequestError, match="latent 20 does not exist"):
        Units.latents("a", AUTOENCODERS["stream"], (20,))
    with pytest.raises(RequestError, match=r"reads attn\.v_out"):
        Units.latents("a", autoencoder("attn.v_out", "attn.v_out", 0), (0,))
    with pytest.raises(RequestError, match="pass autoencoders="):
        attribute_edges(model, tokens, Ablation("zero"), METRIC, units=KINDS["stream"])
    no_mlp = tiny_model(mlp="none")
    with pytest.raises(RequestError, match="MLP is 'none'"):
        GraphShape.of(no_mlp.config, [Units.neurons(0, (0,))])
