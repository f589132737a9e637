"""A sweep is what running every cell alone gives, for every kind of intervention, place and metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, AtPositions, TransformerHooks
from neuron_lens.interventions import (
    AttentionKnockout,
    CrossEntropy,
    Freeze,
    KLDivergence,
    LogitDifference,
    Patch,
    Scale,
    Set,
    TokenLogit,
    TokenProbability,
    TokenRank,
    Zero,
    capture,
    grid,
    sweep,
    to_hooks,
)
from neuron_lens.interventions.grid import as_grid
from neuron_lens.interventions.metrics import bind_metrics
from neuron_lens.interventions.sweep_run import SweepRunner
from neuron_lens.transformer import Transformer
from tests.interventions.models import FAMILIES, everything, prompts, tiny_model
from tests.interventions.test_declared import STREAM, Dictionary, kinds


def loop(model: Transformer, tokens: Tensor, cells: Any, metric: Any, pad: Tensor | None = None) -> Tensor:
    """Every cell alone, with whole forward passes. [cells, batch]"""
    values = []
    for cell in as_grid(cells).cells:
        hooks = cell if isinstance(cell, TransformerHooks) else to_hooks(cell, model, tokens=tokens, pad=pad)
        logits = model(tokens, hooks=hooks, pad=pad)
        values.append(metric(logits, tokens, pad) if hasattr(metric, "bind") else metric(logits))
    return torch.stack(values)


def same(result: Any, expected: Tensor) -> None:
    torch.testing.assert_close(result.per_example().flatten(0, -2), expected, atol=3e-5, rtol=1e-4)


DIFFERENCE = LogitDifference(3, torch.tensor([5, 7]))
DIFFERENCE_OF_ONE = LogitDifference(3, 5)
METRICS = {
    "difference": DIFFERENCE,
    "middle": TokenLogit(2, position=torch.tensor([3, -3])),
    "probability": TokenProbability(torch.tensor([1, 4]), log=True),
    "loss": CrossEntropy(),
    "function": lambda logits: logits[..., 2].mean(-1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_over_every_site_equals_the_loop(family: str) -> None:
    model, tokens, metric = tiny_model(family), prompts(), METRICS["middle"]
    source = everything(model, prompts(seed=5))
    cells = []
    for site, layer in source:
        if layer not in (None, 1):
            continue
        whole = site in ("resid.torso.attn_in", "attn.q_in", "attn.k_in", "attn.v_in")
        place = {"site": site, "layers": layer, "positions": None if whole else (4, -1)}
        cells.append(Patch(**place, source=source.narrowed(site, [layer])))
    same(sweep(model, tokens, cells, metric), loop(model, tokens, cells, metric))


@pytest.mark.parametrize("metric", ["difference", "middle", "loss"])
def test_a_sweep_over_every_kind_equals_the_loop(metric: str) -> None:
    model, tokens = tiny_model(), prompts()
    declared = kinds(model, tokens, everything(model, prompts(seed=5)))
    # and all pairs with a second edit elsewhere, before and behind
    pairs = [
        (one, Scale(site="attn.v_out", layers=(0, 2), heads=1, positions=5, factor=3.0)) for one in declared
    ]
    pairs += [(Set(site="resid.post_emb", positions=6, units=3, value=2.0), one) for one in declared]
    pairs += [(Zero(site=STREAM, layers=1, positions=2), Scale(site="logits", factor=2.0, positions=(3, -1)))]
    cells = [*declared, *pairs]
    same(sweep(model, tokens, cells, METRICS[metric]), loop(model, tokens, cells, METRICS[metric]))


GRIDS = {
    "stream": {"site": STREAM, "layers": range(3), "positions": [0, 2, 3, 6]},
    "heads": {"site": "attn.v_out", "layers": [0, 2], "heads": range(4), "positions": [1, -1]},
    "patterns": {
        "site": "attn.qk_probs",
        "layers": [1],
        "heads": [0, 3],
        "positions": [2, 6],
        "keys": [0, 2],
    },
    "logits of attention": {"site": "attn.qk_logits", "layers": range(3), "heads": [0, (1, 2)]},
    "keys": {"site": "attn.k", "layers": range(3), "heads": range(2), "positions": [0, 5]},
    "neurons": {"site": "mlp.post_act", "layers": range(3), "units": [0, (3, 4, 5)], "rows": [0, 1]},
    "embedding": {"site": ["emb.tok", "resid.post_emb", "resid.post_ln_f"], "positions": [(0, 1), 6]},
}


@pytest.mark.parametrize("places", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("metric", ["difference", "middle", "function"])
def test_a_grid_equals_the_loop(places: dict[str, Any], metric: str) -> None:
    family = "llama" if places["site"] == "attn.k" else "gpt2"
    model, tokens = tiny_model(family), prompts()
    cells = grid(**places, patch_from=everything(model, prompts(seed=5)))
    result = sweep(model, tokens, cells, METRICS[metric])
    assert result.shape == cells.shape
    same(result, loop(model, tokens, cells, METRICS[metric]))


def test_knockouts_and_latents_and_freezes_in_grids() -> None:
    model, tokens = tiny_model(), prompts()
    own = everything(model, prompts(seed=3))
    cells = grid("attn.qk_logits", AttentionKnockout, layers=range(3), positions=[4, 6], keys=[1, (2, 3)])
    same(sweep(model, tokens, cells, DIFFERENCE), loop(model, tokens, cells, DIFFERENCE))
    frozen = [
        (Freeze(site="norm_scale", source=own), Zero(site="attn.v_out", layers=0, heads=h)) for h in range(4)
    ]
    same(sweep(model, tokens, frozen, DIFFERENCE), loop(model, tokens, frozen, DIFFERENCE))


def test_users_own_hooks_join_a_sweep() -> None:
    model, tokens = tiny_model(), prompts()
    first = TransformerHooks().append_to_path(
        "mlp.post_act.fwd", AtLayers(1).append(AtPositions(-1).append(torch.zeros_like))
    )
    second = TransformerHooks().append_to_path(
        "resid.torso.pre_attn.fwd", lambda x, layer, run: x * (layer + run.batch)
    )
    third = TransformerHooks().append_to_path("logits.fwd2", lambda x: x * 2)
    cells = [first, second, third, Zero(site=STREAM, layers=2, positions=6), first | second]
    for metric in (DIFFERENCE, METRICS["middle"], METRICS["function"]):
        same(sweep(model, tokens, cells, metric), loop(model, tokens, cells, metric))


def padded_prompts(side: str) -> tuple[Tensor, Tensor]:
    """Three rows of 5, 7 and 3 tokens."""
    pad = torch.zeros(3, 7, dtype=torch.bool)
    pad[0, slice(0, 2) if side == "left" else slice(5, 7)] = True
    pad[2, slice(0, 4) if side == "left" else slice(3, 7)] = True
    return prompts(3).masked_fill(pad, 0), pad


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_prompts(family: str, side: str) -> None:
    model, (tokens, pad) = tiny_model(family), padded_prompts(side)
    source = everything(model, (tokens + 5) % 23, pad)
    cells: list[Any] = [
        *grid("attn.v_out", Scale, layers=range(3), positions=[1, -1], heads=[0, 3], factor=3.0).cells
    ]
    cells += grid(STREAM, layers=range(3), positions=[0, 2, -1, slice(-2, None)], patch_from=source).cells
    cells += [
        Patch(site=site, layers=1, positions=-1, source=source.narrowed(site, [1]))
        for site, layer in source
        if layer == 1 and site.split(".")[-1] not in ("attn_in", "q_in", "k_in", "v_in")
    ]
    cells += [
        (*cells[0], Zero(site="resid.post_emb", positions=-1)),
        Zero(site="logits", positions=(0, -1), rows=(0, 1)),
    ]
    for metric in (
        LogitDifference(3, 5),
        CrossEntropy(),
        TokenRank(4),
        TokenLogit(2, torch.tensor([1, -2, 0])),
    ):
        same(sweep(model, tokens, cells, metric, pad=pad), loop(model, tokens, cells, metric, pad))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_of_a_sweep_is_the_row_alone(side: str) -> None:
    model, (tokens, pad) = tiny_model("llama"), padded_prompts(side)
    cells = grid(STREAM, Scale, layers=range(3), positions=[0, 2, -1], factor=-1.0)
    together = sweep(model, tokens, cells, DIFFERENCE_OF_ONE, pad=pad).per_example()
    for row in range(3):
        alone = tokens[row][~pad[row]][None]
        expected = sweep(model, alone, cells, DIFFERENCE_OF_ONE).per_example()
        torch.testing.assert_close(together[..., row : row + 1], expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_sweep_runs_only_what_a_cell_can_change(side: str | None, monkeypatch) -> None:
    model = tiny_model()
    tokens, pad = (prompts(3), None) if side is None else padded_prompts(side)
    ran: list[tuple[int, int, int]] = []
    forward = Transformer.forward

    def counted(self: Transformer, x: Tensor, **options: Any) -> Tensor:
        ran.append((options.get("start_at_layer", 0), x.shape[0] // 3, x.shape[1]))
        return forward(self, x, **options)

    monkeypatch.setattr(Transformer, "forward", counted)
    # a column that holds the last token of every row: everything before it is clean
    at = -1 if side != "right" else torch.tensor([4, 6, 2])
    first = {None: 6, "left": 6, "right": 2}[side]
    cells = [Zero(site=STREAM, layers=layer, positions=at) for layer in (1, 2)]
    same(
        sweep(model, tokens, cells, DIFFERENCE_OF_ONE, pad=pad),
        loop(model, tokens, cells, DIFFERENCE_OF_ONE, pad),
    )
    sweeps = ran[: -len(cells)]
    assert sweeps[0] == (0, 1, 7), "the clean run"
    assert sweeps[1:] == [(1, 1, 7 - first), (2, 2, 7 - first)], "one cell in block 1, both in block 2"


def test_the_metric_of_a_padded_row_is_that_of_the_row_alone() -> None:
    model, short = tiny_model(), prompts(1, 5)
    tokens = torch.cat((torch.zeros(1, 2, dtype=torch.long), short), 1)
    pad = torch.tensor([[True, True] + [False] * 5])
    reference = model(prompts(1, 5, seed=8))
    padded_reference = torch.cat((torch.zeros(1, 2, 23), reference), 1)
    pairs = [
        (metric, metric)
        for metric in (CrossEntropy(), TokenRank(3, 2), TokenProbability(1), TokenLogit(3, -2))
    ]
    pairs.append((KLDivergence(reference), KLDivergence(padded_reference)))
    for alone, padded in pairs:
        expected = alone(model(short), short)
        torch.testing.assert_close(padded(model(tokens, pad=pad), tokens, pad), expected)


@pytest.mark.parametrize("cells_at_once", [1, 2, 5])
def test_any_memory_budget_gives_the_same(cells_at_once: int) -> None:
    model, tokens = tiny_model(), prompts()
    cells = grid(
        STREAM, layers=range(3), positions=range(7), patch_from=capture(model, prompts(seed=5), STREAM)
    )
    runner = SweepRunner(model, tokens, None, bind_metrics(DIFFERENCE, tokens, None), 1 << 30)
    # the smallest budget that holds so many cells
    low, high = 0, 1 << 24
    while high - low > 1:
        runner.memory_budget = (low + high) // 2
        try:
            fits = runner.cells_at_once(0) >= cells_at_once
        except RequestError:
            fits = False
        low, high = (low, runner.memory_budget) if fits else (runner.memory_budget, high)
    result = sweep(model, tokens, cells, DIFFERENCE, memory_budget=high)
    same(result, loop(model, tokens, cells, DIFFERENCE))
    with pytest.raises(RequestError, match="memory budget of 1,000 bytes is too small"):
        sweep(model, tokens, cells, DIFFERENCE, memory_budget=1000)


class Stop(Exception):
    """Stands for a killed process."""


def test_an_interrupted_sweep_resumes(tmp_path, monkeypatch) -> None:
    model, tokens = tiny_model(), prompts()
    cells = grid(STREAM, Zero, layers=range(3), positions=range(7))
    whole = sweep(model, tokens, cells, DIFFERENCE)
    run, calls = SweepRunner.run, []

    def stops(self: SweepRunner, group: Any) -> Any:
        calls.append(group)
        if len(calls) == 3:
            raise Stop
        return run(self, group)

    path = tmp_path / "sweep.safetensors"
    small = 60_000
    monkeypatch.setattr(SweepRunner, "run", stops)
    with pytest.raises(Stop):
        sweep(model, tokens, cells, DIFFERENCE, path=path, memory_budget=small)
    resumed = sweep(model, tokens, cells, DIFFERENCE, path=path, memory_budget=small)
    before = len(calls)
    assert torch.equal(sweep(model, tokens, cells, DIFFERENCE, path=path).values(), resumed.values())
    assert len(calls) == before, "a finished sweep runs nothing"
    torch.testing.assert_close(resumed.values(), whole.values(), atol=1e-5, rtol=1e-5)
    with pytest.raises(RequestError, match="holds another sweep"):
        sweep(model, prompts(seed=8), cells, DIFFERENCE, path=path)


def test_results_are_labelled_and_normalised() -> None:
    model, corrupted, clean = tiny_model(), prompts(4, seed=1), prompts(4, seed=2)
    source = capture(model, clean, STREAM)
    cells = grid(STREAM, layers=range(3), positions=[0, slice(None)], patch_from=source)
    both = {"difference": LogitDifference(3, 5), "mean": lambda logits: logits[:, -1, 0].mean()}
    result = sweep(model, corrupted, cells, both, reference_tokens=clean)
    assert list(result.axes) == ["layer", "position"] and result.metrics == ("difference", "mean")
    # the whole stream carries everything: patched at any layer it gives the reference
    for metric in both:
        torch.testing.assert_close(result.normalised(metric)[:, 1], torch.ones(3), atol=1e-4, rtol=1e-4)
    low, high = result.interval("difference")
    assert bool(((low <= result.effect("difference")) & (result.effect("difference") <= high)).all())
    assert "<svg" in result._repr_html_()
    with pytest.raises(RequestError, match="several rows"):
        result.interval("mean")
    with pytest.raises(RequestError, match="did you mean 'difference'"):
        result.values("diference")


def test_a_table_of_a_sweep() -> None:
    pytest.importorskip("pandas")
    model, tokens = tiny_model(), prompts()
    result = sweep(model, tokens, grid("attn.v_out", Zero, layers=range(3), heads=range(4)), DIFFERENCE)
    table = result.to_dataframe()
    assert list(table.columns) == ["layer", "head", "logit_difference", "logit_difference_effect"]
    assert table["logit_difference"].tolist() == result.values().flatten().tolist()


def test_latents_join_a_sweep() -> None:
    from neuron_lens.interventions import EditLatents

    model, tokens, found = tiny_model(), prompts(), {"d": Dictionary()}
    cells = [
        EditLatents(site=STREAM, layers=1, positions=p, autoencoder="d", latents=latent, value=5.0)
        for p in (1, 6)
        for latent in (0, 3)
    ]
    expected = torch.stack(
        [DIFFERENCE(model(tokens, hooks=to_hooks(cell, model, autoencoders=found)), tokens) for cell in cells]
    )
    same(sweep(model, tokens, cells, DIFFERENCE, autoencoders=found), expected)


BAD_CELLS = [
    (Zero(site=STREAM, positions=9), "cell cell 0: position 9 is beyond the prompts"),
    (Zero(site=STREAM, layers=3), "layer 3 does not exist"),
    (Zero(site="attn.v_out", heads=4), "head 4 does not exist"),
    (Zero(site=STREAM, rows=2), "row 2 does not exist"),
    (Zero(site="attn.qk_probs", keys=7), "key 7 is in none of the prompts"),
    (AttentionKnockout(keys=(1, -8), when="after"), "key -8 is in none of the prompts"),
    (TransformerHooks(), "touches nothing"),
    ("nonsense", "expected an intervention"),
]


@pytest.mark.parametrize("cell,message", BAD_CELLS)
def test_bad_cells_are_refused_before_work_starts(cell: Any, message: str, monkeypatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(SweepRunner, "start", lambda self: pytest.fail("work started"))
    with pytest.raises(RequestError, match=message):
        sweep(model, prompts(), [cell], DIFFERENCE)


def test_bad_grids_texts_and_budgets_are_refused_before_work_starts(monkeypatch) -> None:
    model, tokens = tiny_model(), prompts()
    monkeypatch.setattr(SweepRunner, "start", lambda self: pytest.fail("work started"))
    with pytest.raises(RequestError, match="head 4 does not exist"):
        sweep(model, tokens, grid("attn.v_out", Zero, layers=[0, 1], heads=range(5)), DIFFERENCE)
    with pytest.raises(RequestError, match="memory budget of 1,000 bytes is too small"):
        sweep(model, tokens, [Zero(site=STREAM)], DIFFERENCE, memory_budget=1000)
    pico = Transformer.load("pico")
    written = torch.tensor([pico.tokenizer.encode("import os")])
    with pytest.raises(RequestError, match="yield"):
        sweep(pico, written, [Zero(site=STREAM, positions=" yield")], TokenLogit(3))


def test_bad_metrics_and_prompts_are_refused() -> None:
    model, tokens, cells = tiny_model(), prompts(), [Zero(site=STREAM)]
    with pytest.raises(RequestError, match="one number for each row"):
        sweep(model, tokens, cells, lambda logits: logits[:, -1])
    with pytest.raises(RequestError, match="must align position by position"):
        sweep(model, tokens, cells, DIFFERENCE, reference_tokens=prompts(2, 6))
    with pytest.raises(RequestError, match="position 9 is not in row 0"):
        sweep(model, tokens, cells, TokenLogit(3, 9))
    with pytest.raises(RequestError, match="at least one cell"):
        sweep(model, tokens, [], DIFFERENCE)
