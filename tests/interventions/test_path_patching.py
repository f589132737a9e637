"""Path patching equals its definition, and the effect over all paths is that of patching the senders."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions import LogitDifference, Patch, capture, to_hooks
from neuron_lens.interventions.direct_paths import (
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
)
from neuron_lens.interventions.path_patching import Receiver, Sender, path_patch
from neuron_lens.transformer import Transformer
from tests.interventions.models import FAMILIES, prompts, tiny_model

METRIC = LogitDifference(3, 5)
LENGTH = 5
THROUGH = ["nothing", "mlps", "everything"]


def patched(model: Transformer, tokens: Tensor, source: Tensor, site: str, **place: Any) -> Tensor:
    """The metric with one site patched from the source run."""
    patch = Patch(site=site, source=capture(model, source, site), **place)
    return METRIC(model(tokens, hooks=to_hooks(patch, model)), tokens)


def all_receivers(model: Transformer, after: int) -> list[Receiver]:
    layers = range(after + 1, model.config.n_layers)
    parts = [Receiver(part=part, layer=layer) for layer in layers for part in ("q", "k", "v", "mlp")]
    return [*parts, Receiver(part="logits")]


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("family", FAMILIES)
def test_paths_to_all_that_reads_are_patching_the_senders(family: str, through: str) -> None:
    model, base, source = tiny_model(family), prompts(2, LENGTH, seed=1), prompts(2, LENGTH, seed=2)
    mlp = path_patch(
        model, base, source, [Sender(part="mlp", layer=0)], all_receivers(model, 0), METRIC, through=through
    )
    expected = patched(model, base, source, "resid.torso.delta_mlp", layers=0)
    torch.testing.assert_close(mlp.per_example()[0], expected, atol=3e-5, rtol=1e-4)
    if model.config.norm_place != "pre":
        return  # behind a norm a head's share is defined with the divisor held, which patching it is not
    head = [Sender(part="head", layer=0, head=2)]
    receivers = all_receivers(model, 0)
    receivers += [] if model.config.parallel else [Receiver(part="mlp", layer=0)]
    found = path_patch(model, base, source, head, receivers, METRIC, through=through)
    expected = patched(model, base, source, "attn.v_out", layers=0, heads=2)
    torch.testing.assert_close(found.per_example()[0], expected, atol=3e-5, rtol=1e-4)


def test_to_the_logits_through_everything_is_patching_the_sender() -> None:
    model, base, source = tiny_model("llama"), prompts(2, LENGTH, seed=1), prompts(2, LENGTH, seed=2)
    logits = [Receiver(part="logits")]
    found = path_patch(
        model,
        base,
        source,
        [Sender(part="head", layer=1, head=3)],
        logits,
        METRIC,
        through="everything",
    )
    expected = patched(model, base, source, "attn.v_out", layers=1, heads=3)
    torch.testing.assert_close(found.per_example()[0], expected, atol=3e-5, rtol=1e-4)
    direct = path_patch(model, base, source, [Sender(part="head", layer=1, head=3)], logits, METRIC)
    assert float((direct.per_example()[0] - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "parallel"])
def test_through_mlps_is_the_procedure_of_the_paper(family: str) -> None:
    # all heads held but the senders, MLPs recomputed, the receivers' queries recorded; then those patched in
    model, base, source = tiny_model(family), prompts(2, LENGTH, seed=1), prompts(2, LENGTH, seed=2)
    values, others = capture(model, base, "attn.v_out"), capture(model, source, "attn.v_out")
    recording = TransformerHooks()
    for layer in range(3):
        mixed = values["attn.v_out", layer].clone()
        for sender_layer, head in ((0, 1), (1, 3)):
            if sender_layer == layer:
                mixed[:, :, head] = others["attn.v_out", layer][:, :, head]
        recording.append_to_path("attn.v_out.fwd", AtLayers(layer).append(lambda x, mixed=mixed: mixed))
    queries = capture(model, base, "attn.q", hooks=recording)
    patch = Patch(site="attn.q", layers=2, heads=[0, 2], source=queries)
    expected = METRIC(model(base, hooks=to_hooks(patch, model)), base)
    senders = [Sender(part="head", layer=0, head=1), Sender(part="head", layer=1, head=3)]
    receivers = [Receiver(part="q", layer=2, head=head) for head in (0, 2)]
    found = path_patch(model, base, source, senders, receivers, METRIC, through="mlps")
    torch.testing.assert_close(found.per_example()[0], expected, atol=3e-5, rtol=1e-4)
    direct = path_patch(model, base, source, senders, receivers, METRIC)
    assert float((direct.per_example()[0] - expected).abs().max()) > 1e-4


def test_a_linear_model_has_a_closed_form() -> None:
    # no norms and MLPs: what reaches the values of one head reaches the logits through its pattern and its weights
    model = tiny_model(norm="none", mlp="none", n_layers=2, qkv_bias=False, out_bias=False)
    base, source = prompts(2, LENGTH, seed=1), prompts(2, LENGTH, seed=2)
    site = "attn.v_out"
    difference = capture(model, source, site)[site, 0] - capture(model, base, site)[site, 0]
    out = [block.attn.out.weight.unflatten(1, (4, 4)) for block in model.blocks]
    written = torch.einsum("bpe,de->bpd", difference[:, :, 1], out[0][:, 1])
    pattern = capture(model, base, "attn.qk_probs")["attn.qk_probs", 1][:, 3]
    value = written @ model.blocks[1].attn.v.weight.unflatten(0, (4, 4))[3].T
    moved = torch.einsum("bqk,bke,de->bqd", pattern, value, out[1][:, 3])[:, -1]
    expected = moved @ (model.unembed.weight[3] - model.unembed.weight[5])
    found = path_patch(
        model,
        base,
        source,
        [Sender(part="head", layer=0, head=1)],
        [Receiver(part="v", layer=1, head=3)],
        METRIC,
    )
    plain = METRIC(model(base), base)
    torch.testing.assert_close(found.per_example()[0] - plain, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("through", THROUGH)
def test_a_padded_row_gives_what_it_gives_alone(through: str) -> None:
    model, base, source = tiny_model("llama"), prompts(1, LENGTH, seed=1), prompts(1, LENGTH, seed=2)
    pad = torch.tensor([[True, True] + [False] * LENGTH])
    wide = [torch.cat((torch.full((1, 2), 9), one), 1) for one in (base, source)]
    senders = [Sender(part="head", layer=0, head=1), Sender(part="mlp", layer=0)]
    receivers = [[Receiver(part="k", layer=2, head=1)], [Receiver(part="mlp", layer=2)]]
    alone = path_patch(model, base, source, senders, receivers, METRIC, through=through)
    both = path_patch(model, *wide, senders, receivers, METRIC, through=through, pad=pad)
    torch.testing.assert_close(both.values(), alone.values(), atol=1e-5, rtol=1e-4)


def test_direct_paths_from_a_cache_are_those_from_tokens() -> None:
    model, base, source = (
        tiny_model("llama", residual_scale=0.5),
        prompts(2, LENGTH, seed=1),
        prompts(2, LENGTH, seed=2),
    )
    cached = capture(model, source, "attn.v_out")
    for given in (cached, {("z", layer): cached["attn.v_out", layer] for layer in range(3)}):
        torch.testing.assert_close(
            get_act_patch_direct_path(model, base, given, METRIC, 0, 1, "k"),
            get_act_patch_direct_path(model, base, source, METRIC, 0, 1, "k"),
        )
    last = get_act_patch_direct_path(model, base, cached, METRIC, 2, 0)
    torch.testing.assert_close(last, METRIC(model(base), base).mean().expand(3, 4))
    with pytest.raises(RequestError, match="choose prompts of equal length"):
        get_act_patch_direct_path(model, prompts(2, 4), cached, METRIC, 0, 1)
    with pytest.raises(RequestError, match="expected 'q', 'k' or 'v'"):
        get_act_patch_direct_path(model, base, cached, METRIC, 0, 1, "z")
    with pytest.raises(RequestError, match="give the source's tokens"):
        get_act_patch_direct_path(tiny_model("post"), base, cached, METRIC, 0, 1)


def direct_by_hand(
    model: Transformer, base: Tensor, source: Tensor, src: tuple, dst: tuple, component: str
) -> float:
    """The definition: the head's own output, through its output weights, added to one later head's input."""
    (layer, head), (to_layer, to_head) = src, dst
    values = [
        capture(model, tokens, "attn.v_out")["attn.v_out", layer][:, :, head] for tokens in (source, base)
    ]
    width = model.config.d_head
    weight = model.blocks[layer].attn.out.weight[:, head * width : (head + 1) * width]
    difference = (values[0] - values[1]) @ weight.T

    def add(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, to_head] += difference
        return x

    hooks = TransformerHooks().append_to_path(f"attn.{component}_in.fwd", AtLayers(to_layer).append(add))
    return float(METRIC(model(base, hooks=hooks), base).mean())


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths_equal_their_definition(component: str) -> None:
    model, base, source = tiny_model("llama"), prompts(2, LENGTH, seed=1), prompts(2, LENGTH, seed=2)
    table = get_act_patch_direct_path(model, base, source, METRIC, 0, 2, component)
    heads = 4 if component == "q" else 2
    assert table.shape == (3, heads)
    plain = float(METRIC(model(base), base).mean())
    torch.testing.assert_close(table[0], torch.full((heads,), plain))
    for layer, head in itertools.product((1, 2), range(heads)):
        expected = direct_by_hand(model, base, source, (0, 2), (layer, head), component)
        assert float(table[layer, head]) == pytest.approx(expected, abs=3e-5)


def test_direct_paths_from_all_sources() -> None:
    model = tiny_model(n_layers=2)
    base, source = prompts(1, LENGTH, seed=1), prompts(1, LENGTH, seed=2)
    table = get_act_patch_direct_path_all_sources(model, base, source, METRIC, "v")
    assert table.shape == (2, 4, 2, 4)
    torch.testing.assert_close(table[0, 3], get_act_patch_direct_path(model, base, source, METRIC, 0, 3, "v"))


def test_all_senders_into_all_receivers_is_the_source_run() -> None:
    # everything that reads, reads what everything that writes wrote in the source run
    model, base, source = tiny_model(), prompts(2, LENGTH, seed=1), prompts(2, LENGTH, seed=2)
    senders = [Sender(part="embedding")]
    senders += [Sender(part="head", layer=layer, head=head) for layer in range(3) for head in range(4)]
    senders += [Sender(part="mlp", layer=layer) for layer in range(3)]
    result = path_patch(model, base, source, senders, [Receiver(part="logits")], METRIC)
    expected = METRIC(model(source), source).mean()
    torch.testing.assert_close(result.values()[0], expected, atol=3e-5, rtol=1e-4)
    nothing = path_patch(model, base, base, senders, [Receiver(part="mlp", layer=1)], METRIC)
    torch.testing.assert_close(nothing.values()[0], METRIC(model(base), base).mean())


def test_paths_that_do_not_exist_are_refused() -> None:
    model, base = tiny_model(), prompts()
    late = [Sender(part="head", layer=2, head=0)]
    with pytest.raises(RequestError, match="there is no path"):
        path_patch(model, base, base, late, [Receiver(part="q", layer=1, head=0)], METRIC)
    with pytest.raises(RequestError, match="through 'mlp': expected one of"):
        path_patch(model, base, base, late, [Receiver(part="logits")], METRIC, through="mlp")
    with pytest.raises(RequestError, match="they must align"):
        path_patch(model, base, prompts(2, 5), late, [Receiver(part="logits")], METRIC)
    with pytest.raises(RequestError, match="needs a head of 4"):
        path_patch(
            model, base, base, [Sender(part="head", layer=0, head=4)], [Receiver(part="logits")], METRIC
        )
