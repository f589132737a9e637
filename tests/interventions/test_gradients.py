"""Gradients by name agree with finite differences and with each other."""

from __future__ import annotations

import pytest
import torch

from neuron_lens.errors import RequestError
from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions import (
    Ablation,
    Add,
    LogitDifference,
    TokenRank,
    attribute_edges,
    capture,
    grad_at,
    jacobian_rows,
    jvp_at,
    to_hooks,
    vjp_at,
)
from tests.interventions.models import FAMILIES, everything, prompts, tiny_model

METRIC = LogitDifference(3, 5)
EARLY, LATE = "resid.torso.pre_attn", "mlp.post_act"


def wide(family: str = "gpt2"):
    return tiny_model(family).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_with_finite_differences_at_every_site(family: str) -> None:
    # float32 inside norms and softmaxes bounds the accuracy of differences
    model, tokens = wide(family), prompts()
    values = everything(model, tokens)
    heads = {"resid.torso.attn_in", "attn.q_in", "attn.k_in", "attn.v_in"}
    sites = sorted({site for site, _ in values} - heads - {"attn.qk_logits"})
    gradients = {
        **grad_at(model, tokens, METRIC, sites),
        **grad_at(model, tokens, METRIC, ["attn.q_in", "attn.v_in"]),
    }
    generator = torch.Generator().manual_seed(0)
    for site, layer in gradients:
        if layer not in (None, 1):
            continue
        gradient = gradients[site, layer]
        direction = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        direction /= direction.norm()
        step = 1e-2

        def moved(amount: float, site=site, layer=layer, direction=direction) -> float:
            edit = Add(site=site, layers=layer, vector=direction * amount)
            return float(METRIC(model(tokens, hooks=to_hooks(edit, model)), tokens).sum())

        difference = (moved(step) - moved(-step)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(difference, abs=2e-3, rel=2e-2), (
            site,
            layer,
        )


def test_products_with_jacobians_are_adjoint() -> None:
    model, tokens = wide("llama"), prompts()
    generator = torch.Generator().manual_seed(0)
    x, y = capture(model, tokens, EARLY)[EARLY, 0], capture(model, tokens, LATE)[LATE, 2]
    tangent = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    cotangent = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    forward = jvp_at(model, tokens, {(EARLY, 0): tangent}, [LATE, "logits"], layers=2)
    backward = vjp_at(model, tokens, {(LATE, 2): cotangent}, EARLY, layers=0)
    assert set(forward) == {(LATE, 2), ("logits", None)}
    torch.testing.assert_close(
        (forward[LATE, 2] * cotangent).sum(), (tangent * backward[EARLY, 0]).sum(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_products_with_jacobians_agree_with_finite_differences(family: str) -> None:
    model, tokens = wide(family), prompts()
    generator = torch.Generator().manual_seed(1)
    starts = [("attn.v", 0), ("resid.torso.delta_mlp", 1), ("resid.post_emb", None)]
    ends = [("attn.rot_q" if model.config.position == "rotary" else "attn.q", 2), (LATE, 2), ("logits", None)]
    values = capture(model, tokens, {site for site, _ in [*starts, *ends]})
    step = 1e-2
    for start in starts:
        tangent = torch.randn(values[start].shape, generator=generator, dtype=torch.float64)
        tangent /= tangent.norm()

        def moved(amount: float, start=start, tangent=tangent):
            edit = Add(site=start[0], layers=start[1], vector=tangent * amount)
            hooks = to_hooks(edit, model)
            return capture(model, tokens, {site for site, _ in ends}, hooks=hooks)

        up, down = moved(step), moved(-step)
        pushed = jvp_at(model, tokens, {start: tangent}, [site for site, _ in ends])
        for end in ends:
            difference = (up[end] - down[end]) / (2 * step)
            scale = float(difference.abs().max())
            assert scale > 1e-4
            torch.testing.assert_close(pushed[end], difference, atol=0.01 * scale + 2e-4, rtol=2e-2)
            cotangent = torch.randn(difference.shape, generator=generator, dtype=torch.float64)
            pulled = vjp_at(model, tokens, {end: cotangent}, start[0])[start]
            expected = float((difference * cotangent).sum())
            size = float(difference.norm() * cotangent.norm())
            assert float((pulled * tangent).sum()) == pytest.approx(expected, abs=5e-3 * size)


def test_sites_may_come_in_any_order_and_several_pull_back_together() -> None:
    model, tokens = tiny_model("llama"), prompts()
    sites = ["mlp.post_act", "resid.post_emb", "attn.q", "logits", "attn.qk_probs", "resid.torso.pre_attn"]
    forwards = grad_at(model, tokens, METRIC, sites)
    backwards = grad_at(model, tokens, METRIC, sites[::-1])
    assert set(forwards) == set(backwards) and ("logits", None) in forwards and ("attn.q", 2) in forwards
    for place in forwards:
        assert torch.equal(forwards[place], backwards[place])
    values = capture(model, tokens, [LATE, "attn.q"])
    both = {place: torch.ones_like(values[place]) for place in [(LATE, 2), ("attn.q", 1)]}
    whole = vjp_at(model, tokens, both, EARLY)
    parts = [vjp_at(model, tokens, {place: value}, EARLY) for place, value in both.items()]
    for place in whole:
        torch.testing.assert_close(whole[place], parts[0][place] + parts[1][place], atol=1e-5, rtol=1e-4)
    # what stands behind does not move what stands before
    assert bool(
        (jvp_at(model, tokens, {(LATE, 2): values[LATE, 2]}, EARLY, layers=[0, 1])[EARLY, 1] == 0).all()
    )


def test_rows_of_a_jacobian_are_vector_products() -> None:
    model, tokens = tiny_model(), prompts()
    entries = [(3, 5), (-1, 0), (0, 2)]
    found = jacobian_rows(model, tokens, (LATE, 1), entries, [EARLY, "attn.k"], layers=[0, 1])
    assert found[EARLY, 0].shape == (3, 2, 7, 16)
    for row, (position, unit) in enumerate(entries):
        cotangent = torch.zeros(2, 7, 24)
        cotangent[:, position, unit] = 1
        expected = vjp_at(model, tokens, {(LATE, 1): cotangent}, [EARLY, "attn.k"], layers=[0, 1])
        for place in expected:
            torch.testing.assert_close(found[place][row], expected[place], atol=1e-5, rtol=1e-4)
    parts = jacobian_rows(model, tokens, (LATE, 1), entries, [EARLY, "attn.k"], layers=[0, 1], at_once=2)
    for place in found:
        torch.testing.assert_close(parts[place], found[place])


def test_padded_rows_have_the_jacobians_they_have_alone() -> None:
    model, tokens = tiny_model(), prompts(1, 5)
    wide_tokens = torch.cat((torch.full((1, 2), 9), tokens), 1)
    pad = torch.tensor([[True, True] + [False] * 5])
    alone = jacobian_rows(model, tokens, (LATE, 2), [(4, 3)], EARLY, layers=1)[EARLY, 1]
    both = jacobian_rows(model, wide_tokens, (LATE, 2), [(6, 3)], EARLY, layers=1, pad=pad)[EARLY, 1]
    torch.testing.assert_close(both[:, :, 2:], alone, atol=1e-5, rtol=1e-4)
    assert bool((both[:, :, :2] == 0).all())
    tangent = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    padded = torch.cat((torch.randn(1, 2, 16), tangent), 1)
    pushed = jvp_at(model, tokens, {(EARLY, 0): tangent}, "logits")["logits", None]
    with_pads = jvp_at(model, wide_tokens, {(EARLY, 0): padded}, "logits", pad=pad)["logits", None]
    torch.testing.assert_close(with_pads[:, 2:], pushed, atol=1e-4, rtol=1e-4)


def test_what_a_metric_does_not_depend_on_has_gradient_zero_and_padding_none() -> None:
    model, tokens = tiny_model(), prompts()
    gradients = grad_at(model, tokens, LogitDifference(3, 5, position=2), [LATE, EARLY])
    assert bool((gradients[EARLY, 1][:, 3:] == 0).all()) and bool((gradients[EARLY, 1][:, :3] != 0).any())
    short = tokens[:, :5]
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.long), short), 1)
    pad = torch.zeros(2, 7, dtype=torch.bool)
    pad[:, :2] = True
    alone = grad_at(model, short, METRIC, EARLY)
    both = grad_at(model, padded, METRIC, EARLY, pad=pad)
    torch.testing.assert_close(both[EARLY, 1][:, 2:], alone[EARLY, 1], atol=1e-5, rtol=1e-4)


def test_gradients_follow_interventions_and_refuse_misfits() -> None:
    model, tokens = tiny_model(), prompts()
    cut = TransformerHooks().append_to_path("resid.torso.delta_mlp.fwd", torch.zeros_like)
    assert bool((grad_at(model, tokens, METRIC, LATE, hooks=cut)[LATE, 1] == 0).all())
    with pytest.raises(RequestError, match="the cotangent of"):
        vjp_at(model, tokens, {(LATE, 1): torch.ones(2, 7, 3)}, EARLY)
    with pytest.raises(RequestError, match="at least one row"):
        jacobian_rows(model, tokens, (LATE, 1), [(1, 0)], EARLY, at_once=0)
    with pytest.raises(RequestError, match="no entry of"):
        jacobian_rows(model, tokens, (LATE, 1), [(9, 0)], EARLY)


def test_gradients_do_not_mind_the_callers_mode_but_a_metric_without_one() -> None:
    model, tokens = tiny_model(), prompts()
    values = capture(model, tokens, [EARLY, LATE])
    ones = {(LATE, 2): torch.ones_like(values[LATE, 2])}

    def all_of_them() -> list[torch.Tensor]:
        scores = attribute_edges(model, tokens, Ablation("patch", prompts(seed=3)), METRIC).scores
        return [
            grad_at(model, tokens, METRIC, EARLY)[EARLY, 1],
            vjp_at(model, tokens, ones, EARLY)[EARLY, 1],
            jvp_at(model, tokens, {(EARLY, 1): values[EARLY, 1]}, LATE)[LATE, 2],
            jacobian_rows(model, tokens, (LATE, 2), [(3, 4)], EARLY)[EARLY, 1],
            scores,
        ]

    expected = all_of_them()
    with torch.no_grad():
        found = all_of_them()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for metric in (TokenRank(3), lambda logits: logits[:, -1].detach().sum(-1)):
        with pytest.raises(RequestError, match="has no gradient by the logits"):
            grad_at(model, tokens, metric, EARLY)
        with pytest.raises(RequestError, match="has no gradient by the logits"):
            attribute_edges(model, tokens, Ablation("zero"), metric)
