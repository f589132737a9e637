"""Patches from other layers, positions, sites and runs, of the same run or another."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_lens.errors import HookError, RequestError
from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions import (
    Patch,
    Scale,
    TokenLogit,
    Zero,
    capture,
    load_interventions,
    save_interventions,
    sweep,
    to_hooks,
)
from neuron_lens.interventions.order import computed_before
from tests.interventions.models import FAMILIES, everything, prompts, tiny_model
from tests.interventions.test_padded_patterns import padded, rows_of

STREAM, LEAVING, MLP, ATTENTION = (
    f"resid.torso.{site}" for site in ("pre_attn", "post_mlp", "delta_mlp", "delta_attn")
)
SAME_RUN: dict[str, dict[str, Any]] = {
    "another layer": {"site": ATTENTION, "layers": 2, "source_layer": 0},
    "another layer, some heads and positions": {
        "site": "attn.v_out", "layers": 2, "source_layer": 1, "heads": (0, 3), "positions": (2, -1)
    },
    "another site of the layer": {"site": MLP, "source_site": ATTENTION},
    "another site, layer and position": {
        "site": MLP, "layers": 1, "source_site": ATTENTION, "source_layer": 0, "positions": (3, -1), "source_positions": (1, 2)
    },
    "the embedding": {"site": STREAM, "layers": (1, 2), "source_site": "resid.post_emb", "positions": -2},
    "a pattern": {"site": "attn.qk_probs", "layers": 2, "source_layer": 1, "heads": 1},
    "the end from the middle": {"site": "resid.post_ln_f", "source_site": LEAVING, "source_layer": 0, "units": (1, 2)},
    "other positions": {"site": STREAM, "layers": 1, "positions": (3, 4), "source_positions": (0, 1)},
}  # fmt: skip


def recorded(patch: Patch, source: Any) -> Patch:
    """The same patch, taking from a recorded run."""
    return patch.model_copy(update={"source": source})


@pytest.mark.parametrize("fields", SAME_RUN.values(), ids=SAME_RUN)
@pytest.mark.parametrize("family", FAMILIES)
def test_taking_from_the_same_run_is_taking_from_its_recording(family: str, fields: dict[str, Any]) -> None:
    model, tokens = tiny_model(family), prompts()
    patch = Patch(**fields)
    if any(path in model.config.absent_sites() for path in patch.sites()):
        pytest.skip("a site that this family does not have")
    # one layer: what is taken is computed before anything is changed, so the clean run has the same
    source = everything(model, tokens)
    if fields["site"] == MLP and "layers" not in fields:
        patch = patch.model_copy(update={"layers": (1,)})
    together = model(tokens, hooks=to_hooks(patch, model))
    torch.testing.assert_close(together, model(tokens, hooks=to_hooks(recorded(patch, source), model)))
    assert not torch.equal(together, model(tokens))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SAME_RUN)
def test_in_padded_rows_and_sweeps_it_is_the_row_alone(name: str, side: str) -> None:
    model, rows, patch = tiny_model("llama"), rows_of(), Patch(**SAME_RUN[name])
    tokens, pad = padded(rows, side)
    others = torch.where(pad, tokens, (tokens + 5) % 23)
    source = everything(model, others, pad)
    metric = TokenLogit(3)
    for one, its_source in ((patch, None), (recorded(patch, source), source)):
        together = model(tokens, pad=pad, hooks=to_hooks(one, model))
        swept = sweep(model, tokens, [one, (one, Zero(site=STREAM, layers=2, positions=1))], metric, pad=pad)
        torch.testing.assert_close(
            swept.per_example()[0], metric(together, tokens, pad), atol=3e-5, rtol=1e-4
        )
        for i, row in enumerate(rows):
            alone = one if its_source is None else recorded(patch, everything(model, (row + 5) % 23))
            expected = model(row, hooks=to_hooks(alone, model))
            torch.testing.assert_close(together[i : i + 1, ~pad[i]], expected, atol=3e-5, rtol=1e-4)
            unpadded = sweep(model, row, [alone], metric).per_example()[0]
            torch.testing.assert_close(unpadded, metric(expected, row), atol=3e-5, rtol=1e-4)


def test_what_is_taken_is_what_leaves_the_site_after_other_edits() -> None:
    model, tokens = tiny_model(), prompts()
    twice = Scale(site=ATTENTION, layers=0, factor=2.0)
    patch = Patch(site=ATTENTION, layers=1, source_layer=0)
    after = capture(model, tokens, ATTENTION, hooks=to_hooks([patch, twice], model))
    assert torch.equal(after[ATTENTION, 1], after[ATTENTION, 0])
    assert torch.equal(after[ATTENTION, 0], 2 * capture(model, tokens, ATTENTION)[ATTENTION, 0])


def test_generation_takes_from_the_same_step_alike_with_and_without_a_cache() -> None:
    model, lists = tiny_model("llama", n_ctx=16), [row[0].tolist() for row in rows_of()]
    for fields in (
        SAME_RUN["another layer"],
        SAME_RUN["other positions"],
        SAME_RUN["another site of the layer"],
    ):
        hooks = to_hooks(Patch(**fields), model)
        options = {"max_new_tokens": 4, "temperature": 0, "hooks": hooks, "return_logits": True}
        cached, whole = (model.sample(lists, use_kv_cache=cache, **options) for cache in (True, False))
        for one, two in zip(cached, whole, strict=True):
            torch.testing.assert_close(one.logits, two.logits, atol=3e-5, rtol=1e-4)


def test_a_stored_patch_of_the_same_run_acts_the_same(tmp_path) -> None:
    model, tokens = tiny_model(), prompts()
    patch = Patch(**SAME_RUN["another site, layer and position"])
    save_interventions([patch], tmp_path / "patch.json")
    (loaded,) = load_interventions(tmp_path / "patch.json")
    assert loaded == patch
    assert torch.equal(
        model(tokens, hooks=to_hooks(loaded, model)), model(tokens, hooks=to_hooks(patch, model))
    )


BAD = [
    ({"site": STREAM, "layers": 1}, "give source"),
    ({"site": STREAM, "layers": 1, "source_layer": 2}, "computed after"),
    ({"site": STREAM, "source_layer": 1}, "computed after"),  # layer 0 comes before
    ({"site": ATTENTION, "layers": 1, "source_site": MLP}, "computed after"),
    ({"site": STREAM, "layers": 1, "source_layer": 7}, "source layer 7 does not exist"),
    ({"site": STREAM, "layers": 1, "source_site": "mlp.post_act", "source_layer": 0}, "must have one shape"),
    ({"site": "resid.post_ln_f", "source_site": STREAM}, "say which with source_layer"),
    ({"site": STREAM, "layers": 1, "source_site": "resid.torso.pre_atn"}, "did you mean"),
    ({"site": STREAM, "layers": 1, "source_layer": 0, "source_row": 1}, "another row is taken from a recorded run"),
]  # fmt: skip


@pytest.mark.parametrize("fields,message", BAD)
def test_what_the_same_run_cannot_give_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        to_hooks(Patch(**fields), tiny_model())


def test_a_pass_that_began_behind_the_source_says_so() -> None:
    model, tokens = tiny_model(), prompts()
    hooks = to_hooks(Patch(site=ATTENTION, layers=2, source_layer=0), model)
    with pytest.raises((RequestError, HookError), match="began behind"):
        model(model(tokens, stop_at_layer=1), start_at_layer=1, hooks=hooks)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_fire_in_the_order_that_patches_rely_on(family: str) -> None:
    model = tiny_model(family)
    fired: list[tuple[str, int | None]] = []
    absent = model.config.absent_sites()

    def note(x: Tensor, path: str, layer: int | None = None) -> None:
        fired.append((path, layer))

    for heads in (False, True):
        hooks = TransformerHooks()
        for site in hooks.sites():
            inputs = site.path.rsplit(".")[-1] in ("q_in", "k_in", "v_in", "attn_in")
            if site.path not in absent and (inputs if heads else not inputs):
                site.fwd.append(lambda x, path=site.path, layer=None: note(x, path, layer))
        fired.clear()
        model(prompts(), hooks=hooks)
        pairs = list(itertools.pairwise(fired))
        assert pairs and all(computed_before(one, other) for one, other in pairs)
