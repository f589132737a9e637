"""Edges: exact ablation obeys its laws, attribution is exact where the model is linear, circuits are data."""

from __future__ import annotations

import pytest
import torch

from neuron_lens.errors import RequestError
from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions import (
    Ablation,
    Add,
    Circuit,
    Freeze,
    GraphShape,
    LogitDifference,
    Patch,
    Receiver,
    Sender,
    Units,
    attribute_edges,
    attribution_patch,
    capture,
    exact_edge_effects,
    grad_at,
    path_patch,
    run_circuit,
    score_circuit,
    to_hooks,
)
from neuron_lens.interventions.circuits import sender_outputs
from tests.interventions.models import FAMILIES, prompts, tiny_model

METRIC = LogitDifference(3, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_are_the_model_and_none_the_other_run(family: str) -> None:
    model, tokens, others = tiny_model(family), prompts(seed=1), prompts(seed=2)
    every = Circuit(GraphShape.of(model.config))
    patch = Ablation("patch", others)
    torch.testing.assert_close(
        run_circuit(model, tokens, every, patch, METRIC), METRIC(model(tokens), tokens)
    )
    nothing = run_circuit(model, tokens, every.complement(), patch, METRIC)
    torch.testing.assert_close(nothing, METRIC(model(others), others), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_edge_is_a_direct_path(family: str) -> None:
    model, tokens, others = tiny_model(family), prompts(seed=1), prompts(seed=2)
    every = Circuit(GraphShape.of(model.config))
    pairs = [
        ("head 0.2", "q 2.1", Sender(part="head", layer=0, head=2), Receiver(part="q", layer=2, head=1)),
        ("embedding", "v 1.0", Sender(part="embedding"), Receiver(part="v", layer=1, head=0)),
        ("mlp 1", "logits", Sender(part="mlp", layer=1), Receiver(part="logits")),
        ("head 0.0", "mlp 1", Sender(part="head", layer=0, head=0), Receiver(part="mlp", layer=1)),
    ]
    for sender, receiver, one, other in pairs:
        without = every.with_edges([(sender, receiver)]).complement()
        cut = run_circuit(model, tokens, without, Ablation("patch", others), METRIC).mean()
        direct = path_patch(model, tokens, others, [one], [other], METRIC).values()[0]
        torch.testing.assert_close(cut, direct, atol=3e-5, rtol=1e-4, msg=f"{sender} -> {receiver}")


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_effects_are_those_of_circuits_without_one_edge(family: str) -> None:
    model, tokens, others = tiny_model(family), prompts(seed=1), prompts(seed=2)
    shape = GraphShape.of(model.config, [Units.neurons(1, (0, 4))])
    chosen = torch.arange(shape.possible.numel()).view(shape.possible.shape) % 23 == 0
    chosen[:3, [port.name for port in shape.receivers].index("mlp 1")] = True
    some = Circuit(shape, None, chosen)
    every = Circuit(shape)
    cut = TransformerHooks().append_to_path("mlp.post_act.fwd", lambda x: x * 0.5)
    for ablation, hooks in ((Ablation("patch", others), None), (Ablation("zero"), cut)):
        exact = exact_edge_effects(model, tokens, ablation, METRIC, some, hooks=hooks)
        whole = run_circuit(model, tokens, every, ablation, METRIC, hooks=hooks).mean()
        for edge in exact.edges():
            without = every.with_edges([(edge.sender, edge.receiver)]).complement()
            expected = run_circuit(model, tokens, without, ablation, METRIC, hooks=hooks).mean() - whole
            assert edge.score == pytest.approx(float(expected), abs=3e-5), edge


@pytest.mark.parametrize("method", ["gradient", "integrated_inputs", "integrated_activations"])
def test_edge_attribution_is_exact_where_the_model_is_linear(method: str) -> None:
    # without norms and MLPs, and with patterns held, the logits are linear in everything that is written
    model = tiny_model(norm="none", mlp="none", n_layers=2)
    tokens, others = prompts(seed=1), prompts(seed=2)
    held = to_hooks(Freeze(site="attention_pattern", source=capture(model, tokens, "attn.qk_probs")), model)
    for ablation in (Ablation("patch", others), Ablation("resample", others, seed=3), Ablation("zero")):
        if ablation.kind == "zero" and method == "integrated_inputs":
            continue
        estimated = attribute_edges(model, tokens, ablation, METRIC, method=method, steps=2, hooks=held)
        # every fifth edge, to be quick
        some = torch.arange(estimated.kept.numel()).view(estimated.kept.shape) % 5 == 0
        chosen = Circuit(estimated.shape, None, some)
        exact = exact_edge_effects(model, tokens, ablation, METRIC, chosen, hooks=held)
        torch.testing.assert_close(
            estimated.scores[chosen.kept], exact.scores[chosen.kept], atol=2e-5, rtol=1e-3
        )
        assert float(exact.scores.abs().max()) > 1e-3


def test_edge_attribution_orders_edges_as_the_exact_effects_do() -> None:
    model = tiny_model("llama", n_layers=2)
    tokens, others = prompts(4, seed=1), prompts(4, seed=1).clone()
    others[:, 2] = (others[:, 2] + 1) % 23
    ablation = Ablation("patch", others)
    shape = GraphShape.of(model.config)
    some = torch.arange(shape.possible.numel()).view(shape.possible.shape) % 2 == 0
    exact = exact_edge_effects(model, tokens, ablation, METRIC, Circuit(shape, None, some))
    possible = exact.kept

    def ranks(x: torch.Tensor) -> torch.Tensor:
        return x[possible].abs().argsort().argsort().double()

    for method in ("gradient", "integrated_inputs", "integrated_activations"):
        estimated = attribute_edges(model, tokens, ablation, METRIC, method=method, steps=4)
        correlation = torch.corrcoef(torch.stack((ranks(estimated.scores), ranks(exact.scores))))[0, 1]
        assert float(correlation) > 0.6, method


def test_integrated_activations_average_gradients_while_a_layer_part_moves() -> None:
    model, tokens, others = tiny_model(), prompts(seed=1), prompts(seed=2)
    found = attribute_edges(
        model, tokens, Ablation("patch", others), METRIC, method="integrated_activations", steps=2
    )
    stream, shape = "resid.torso.post_mlp", found.shape
    senders = [node.name for node in shape.senders]
    difference = sender_outputs(model, others) - sender_outputs(model, tokens)
    for site, parts in (
        ("resid.torso.delta_attn", [f"head 1.{head}" for head in range(4)]),
        ("resid.torso.delta_mlp", ["mlp 1"]),
    ):
        rows = [senders.index(name) for name in parts]
        whole = difference[rows].sum(0)
        gradients = []
        for fraction in (0.25, 0.75):
            moved = to_hooks(Add(site=site, layers=1, vector=whole * fraction), model)
            gradients.append(grad_at(model, tokens, METRIC, stream, hooks=moved)[stream, 2])
        expected = (difference[rows] * torch.stack(gradients).mean(0)).sum((2, 3)).mean(1)
        torch.testing.assert_close(found.scores[rows, -1], expected, atol=1e-5, rtol=1e-3)


def test_attribution_patching_of_nodes_is_exact_to_first_order() -> None:
    model, tokens = tiny_model(), prompts(seed=1)
    here = capture(model, tokens, ["attn.v_out", "mlp.post_act"])
    step = 1e-2
    near = {
        place: here[place]
        + step * torch.randn(here[place].shape, generator=torch.Generator().manual_seed(place[1]))
        for place in here
    }
    estimates = attribution_patch(model, tokens, near_source := type(here)(near), METRIC)
    plain = METRIC(model(tokens), tokens)
    for site, layer in (("attn.v_out", 0), ("mlp.post_act", 1)):
        patched = model(tokens, hooks=to_hooks(Patch(site=site, layers=layer, source=near_source), model))
        exact = METRIC(patched, tokens) - plain
        torch.testing.assert_close(estimates[site, layer].flatten(1).sum(1), exact, atol=3e-3, rtol=0.1)


def test_attribution_patching_of_a_padded_row_is_that_of_the_row_alone() -> None:
    model, tokens, others = tiny_model("llama"), prompts(1, 5, seed=1), prompts(1, 5, seed=2)
    sites = ["attn.v_out", "resid.post_emb"]
    wide, pad = padded(tokens, 1, 1)
    wide_others, _ = padded(others, 1, 1)
    alone = attribution_patch(model, tokens, capture(model, others, sites), METRIC)
    both = attribution_patch(model, wide, capture(model, wide_others, sites, pad=pad), METRIC, pad=pad)
    for place in alone:
        torch.testing.assert_close(both[place][:, 1:-1], alone[place], atol=1e-5, rtol=1e-3)
        assert bool((both[place][:, [0, -1]] == 0).all())


def test_faithfulness_and_completeness_have_their_ends() -> None:
    model, tokens, others = tiny_model(), prompts(seed=1), prompts(3, seed=2)
    every = Circuit(GraphShape.of(model.config))
    for ablation in (Ablation("zero"), Ablation("mean", others), Ablation("resample", others)):
        whole = score_circuit(model, tokens, every, ablation, METRIC)
        assert whole.faithfulness == pytest.approx(1) and whole.completeness == pytest.approx(1)
        nothing = score_circuit(model, tokens, every.complement(), ablation, METRIC)
        assert nothing.faithfulness == pytest.approx(0) and nothing.completeness == pytest.approx(0)


def _shares(circuit: Circuit, node: int, used: torch.Tensor) -> bool:
    """Whether a receiver that feeds a node feeds a used one too, as keys of grouped heads do."""
    ports = set(circuit.shape.fed_by[node])
    return any(bool(used[other]) and ports & set(fed) for other, fed in enumerate(circuit.shape.fed_by))


def test_pruning_keeps_what_it_says() -> None:
    model, tokens, others = tiny_model("llama"), prompts(seed=1), prompts(seed=2)
    scored = attribute_edges(model, tokens, Ablation("patch", others), METRIC)
    best = scored.top(20)
    assert len(best) == 20
    assert float(best.scores[best.kept].abs().min()) >= float(
        scored.scores[scored.shape.possible & ~best.kept].abs().max()
    )
    threshold = float(best.scores[best.kept].abs().min())
    assert torch.equal(scored.above(threshold).kept, best.kept)
    grown = scored.greedy(20)
    assert len(grown) == 20
    used = grown.kept.any(1)
    for node, ports in enumerate(scored.shape.fed_by):
        assert bool(used[node]) or not bool(grown.kept[:, ports].any()) or _shares(scored, node, used)
    reached = grown.pruned()
    # every edge of a greedy circuit leads to the logits: pruning takes only those that nothing feeds
    assert set(reached.nodes()) <= set(grown.nodes()) and torch.equal(reached.pruned().kept, reached.kept)
    lonely = scored.with_edges([("head 0.1", "q 1.0"), ("embedding", "logits")]).pruned()
    assert [(edge.sender, edge.receiver) for edge in lonely.edges()] == [("embedding", "logits")]
    unread = scored.with_edges([("embedding", "v 0.0"), ("embedding", "logits")]).pruned()
    assert [(edge.sender, edge.receiver) for edge in unread.edges()] == [("embedding", "logits")]
    some = scored.among(["embedding", "head 1.2", "logits"])
    expected = {("embedding", port) for port in ("q 1.2", "k 1.1", "v 1.1", "logits")}
    assert {(edge.sender, edge.receiver) for edge in some.edges()} == expected | {("head 1.2", "logits")}
    chain = scored.with_edges([("embedding", "v 0.0"), ("head 0.1", "logits")]).pruned()
    assert len(chain) == 2, "kv head 0 feeds heads 0 and 1"


def test_circuits_are_stored_and_loaded(tmp_path) -> None:
    model, tokens, others = tiny_model("llama"), prompts(seed=1), prompts(seed=2)
    scored = attribute_edges(model, tokens, Ablation("patch", others), METRIC).top(11)
    scored.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == scored
    (tmp_path / "circuit.json").write_text('{"format": 1, "edges": [{}], "shape": {}}')
    with pytest.raises(RequestError, match="n_layers"):
        Circuit.load(tmp_path / "circuit.json")


def test_what_makes_no_sense_is_refused() -> None:
    model, tokens = tiny_model(), prompts()
    every = Circuit(GraphShape.of(model.config))
    with pytest.raises(RequestError, match="it reads before that writes"):
        every.with_edges([("mlp 2", "q 1.0")])
    with pytest.raises(RequestError, match=r"the graph has no 'head 9\.0'"):
        every.with_edges([("head 9.0", "logits")])
    with pytest.raises(RequestError, match="give tokens"):
        run_circuit(model, tokens, every, Ablation("mean"), METRIC)
    with pytest.raises(RequestError, match="they must align"):
        run_circuit(model, tokens, every, Ablation("patch", prompts(2, 5)), METRIC)
    with pytest.raises(RequestError, match="of a graph of"):
        run_circuit(tiny_model("llama"), tokens, every, Ablation("zero"), METRIC)
    with pytest.raises(RequestError, match="has none for each row"):
        attribute_edges(model, tokens, Ablation("zero"), METRIC, method="integrated_inputs")
    with pytest.raises(RequestError, match="expected one of 'gradient'"):
        attribute_edges(model, tokens, Ablation("zero"), METRIC, method="eap")
    with pytest.raises(RequestError, match="no node 'mlp 7'"):
        every.among(["embedding", "mlp 7"])
    with pytest.raises(RequestError, match="the circuit would be empty: no edge has a score of 1"):
        every.above(1.0)
    with pytest.raises(RequestError, match="no path of the circuit"):
        every.with_edges([("head 0.0", "logits")]).pruned()
    for nothing in (lambda: every.top(0), lambda: every.greedy(0), lambda: every.with_edges([])):
        with pytest.raises(RequestError, match="at least one"):
            nothing()


def padded(tokens: torch.Tensor, left: int, right: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(tokens)
    sides = [torch.full((rows, width), 9) for width in (left, right)]
    pad = torch.zeros(rows, left + tokens.shape[1] + right, dtype=torch.bool)
    pad[:, :left], pad[:, pad.shape[1] - right :] = True, True
    return torch.cat((sides[0], tokens, sides[1]), 1), pad


@pytest.mark.parametrize(
    "family, side",
    [
        ("gpt2", (2, 0)),
        ("gpt2", (0, 2)),
        ("llama", (2, 0)),
        ("parallel", (1, 1)),
        ("post", (0, 2)),
        ("sandwich", (1, 1)),
    ],
)
def test_a_padded_row_gives_what_it_gives_alone(family: str, side: tuple[int, int]) -> None:
    model, tokens, others = tiny_model(family), prompts(1, 5, seed=1), prompts(1, 5, seed=2)
    wide, pad = padded(tokens, *side)
    wide_others, _ = padded(others, *side)
    units = [Units.neurons(1, (0, 4))]
    for alone, both in (
        (Ablation("patch", others), Ablation("patch", wide_others, pad=pad)),
        (Ablation("mean", others), Ablation("mean", wide_others, pad=pad)),
        (Ablation("resample", others), Ablation("resample", wide_others, pad=pad)),
    ):
        methods = ["gradient", "integrated_activations"] + ["integrated_inputs"] * (alone.kind == "patch")
        for method in methods:
            options = {"method": method, "steps": 2, "units": units}
            expected = attribute_edges(model, tokens, alone, METRIC, **options)
            found = attribute_edges(model, wide, both, METRIC, pad=pad, **options)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-3)
        some = expected.top(30)
        torch.testing.assert_close(
            run_circuit(model, wide, some, both, METRIC, pad=pad),
            run_circuit(model, tokens, some, alone, METRIC),
            atol=1e-5,
            rtol=1e-4,
        )


def test_rows_of_a_padded_batch_are_averaged_and_must_align() -> None:
    model = tiny_model()
    short, long = prompts(1, 4, seed=1), prompts(1, 7, seed=2)
    short_others, long_others = prompts(1, 4, seed=3), prompts(1, 7, seed=4)
    wide, pad = padded(short, 3, 0)
    wide_others, _ = padded(short_others, 3, 0)
    both, both_others = torch.cat((wide, long)), torch.cat((wide_others, long_others))
    pads = torch.cat((pad, torch.zeros_like(pad)))
    found = attribute_edges(model, both, Ablation("patch", both_others, pad=pads), METRIC, pad=pads)
    alone = [
        attribute_edges(model, one, Ablation("patch", other), METRIC).scores
        for one, other in ((short, short_others), (long, long_others))
    ]
    torch.testing.assert_close(found.scores, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-3)
    for kind in ("patch", "resample"):
        with pytest.raises(RequestError, match="padding elsewhere"):
            attribute_edges(model, both, Ablation(kind, both_others), METRIC, pad=pads)
    # rows are drawn from those that align
    patch = Ablation("patch", both_others, pad=pads).outputs(model, both, pad=pads)
    for seed in range(8):
        drawn = Ablation("resample", both_others.repeat(4, 1), pad=pads.repeat(4, 1), seed=seed)
        whole = drawn.outputs(model, both, pad=pads)
        torch.testing.assert_close(whole[:, 1], patch[:, 1])
        torch.testing.assert_close(whole[:, 0, 3:], patch[:, 0, 3:])


def test_resampling_draws_all_rows_alike() -> None:
    model, tokens = tiny_model(n_layers=1), prompts(200, 3, seed=1)
    others = torch.arange(4)[:, None].expand(4, 3).contiguous()
    written = Ablation("resample", others, seed=1).outputs(model, tokens)[0, :, 0]
    counts = [
        int((written == row).all(-1).sum())
        for row in Ablation("patch", others).outputs(model, others)[0, :, 0]
    ]
    assert sum(counts) == 200 and min(counts) > 25
