"""Laws of declared interventions: what each kind does, where it acts, and that they are data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuron_lens.errors import HookError, RequestError
from neuron_lens.interventions import (
    Activations,
    Add,
    AddRecorded,
    AttentionKnockout,
    Clamp,
    EditLatents,
    Freeze,
    Intervention,
    MeanAblate,
    Patch,
    PerRow,
    ProjectOut,
    ResampleAblate,
    Scale,
    Set,
    Span,
    TokenText,
    Zero,
    capture,
    frozen_sites,
    load_interventions,
    mean_activations,
    save_interventions,
    to_hooks,
)
from neuron_lens.transformer import Transformer
from tests.interventions.models import FAMILIES, everything, prompts, tiny_model

STREAM = "resid.torso.pre_attn"


def at_site(
    model: Transformer, tokens: Tensor, one: Intervention, layer: int | None = 1, **options: object
) -> Tensor:
    """What leaves the intervention's site in a run with it."""
    hooks = to_hooks(one, model, tokens=tokens, **options)  # type: ignore[arg-type]
    return capture(model, tokens, one.site, hooks=hooks)[one.site, layer]


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_a_run_with_itself_changes_nothing(family: str) -> None:
    model, tokens = tiny_model(family), prompts()
    own, plain = everything(model, tokens), model(tokens)
    for site in {path for path, _ in own}:
        patched = model(tokens, hooks=to_hooks(Patch(site=site, source=own), model))
        torch.testing.assert_close(
            patched, plain, atol=2e-5, rtol=1e-5, msg=lambda m, site=site: f"{site}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", range(3))
def test_patching_the_whole_stream_gives_the_source(family: str, layer: int) -> None:
    model, corrupted, clean = tiny_model(family), prompts(seed=1), prompts(seed=2)
    patch = Patch(site=STREAM, layers=layer, source=capture(model, clean, STREAM))
    torch.testing.assert_close(model(corrupted, hooks=to_hooks(patch, model)), model(clean))


def kinds(model: Transformer, tokens: Tensor, source: Activations) -> list[Intervention]:
    """One of every kind, at several kinds of place."""
    vector = torch.randn(16, generator=torch.Generator().manual_seed(3))
    place = {"site": STREAM, "layers": 1, "positions": (2, -1)}
    means = mean_activations(source.narrowed(STREAM, [1]))
    frozen = Activations({k: source[k] for k in source if k[0] in frozen_sites("mlp_output", "norm_scale")})
    return [
        Zero(**place),
        Set(**place, value=vector),
        Scale(**place, factor=-2.0),
        Add(**place, vector=vector, scale=3.0, length="matched", keep_norm=True),
        Clamp(**place, low=-0.1, high=0.2),
        ProjectOut(**place, directions=torch.stack((vector, vector.flip(0)))),
        AddRecorded(**place, source=source.narrowed(STREAM, [1])),
        MeanAblate(**place, source=means),
        ResampleAblate(**place, source=source.narrowed(STREAM, [1]), seed=4),
        Patch(**place, source=source.narrowed(STREAM, [1])),
        Patch(**place, source=source.narrowed(STREAM, [0, 2]), source_layer=2, source_positions=(0, 1)),
        Patch(site=STREAM, positions=(4, 5), source_positions=(1, 2)),
        Patch(
            site="attn.v_out",
            heads=(0, 2),
            rows=1,
            layers=(0, 2),
            source=source.narrowed("attn.v_out", [0, 2]),
        ),
        Zero(site="mlp.post_act", units=(3, 5), positions=Span(start=-3)),
        Zero(site="attn.k", heads=1, positions=PerRow(positions=((1,), (2, 3)))),
        Freeze(site="mlp_output", layers=2, source=frozen),
        Freeze(site="norm_scale", source=frozen),
        AttentionKnockout(positions=(3, 4), keys=(1, -2), heads=(0, 1), layers=1),
        AttentionKnockout(cells=((3, 1), (5, 5)), when="after", renormalise=False),
    ]


def test_stored_interventions_are_equal_and_act_the_same(tmp_path) -> None:
    model, tokens = tiny_model(), prompts()
    declared = kinds(model, tokens, everything(model, prompts(seed=5)))
    save_interventions(declared, tmp_path / "some.json")
    loaded = load_interventions(tmp_path / "some.json")
    assert loaded == declared
    plain = model(tokens)
    for before, after in zip(declared, loaded, strict=True):
        assert hash(before) == hash(after) and before.content_hash() == after.content_hash()
        acted = model(tokens, hooks=to_hooks(before, model))
        assert torch.equal(acted, model(tokens, hooks=to_hooks(after, model)))
        assert not torch.equal(acted, plain), f"{before.label()} did nothing"
    assert len({one.content_hash() for one in declared}) == len(declared)


def test_only_the_named_part_changes() -> None:
    model, tokens = tiny_model(), prompts(3)
    before = capture(model, tokens, "attn.v_out")["attn.v_out", 1]
    one = Zero(site="attn.v_out", layers=1, positions=(2, -1), heads=(1, 3), units=0, rows=(0, 2))
    after = at_site(model, tokens, one)
    expected = before.clone()
    for row in (0, 2):
        for position in (2, 6):
            for head in (1, 3):
                expected[row, position, head, 0] = 0
    assert torch.equal(after, expected)


def test_each_kind_does_what_it_says() -> None:
    model, tokens = tiny_model(), prompts()
    x = capture(model, tokens, STREAM)[STREAM, 1]
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    place = {"site": STREAM, "layers": 1}
    unit = vector / vector.norm()
    length = x.norm(dim=-1, keepdim=True)
    assert torch.equal(at_site(model, tokens, Set(**place, value=vector)), vector.expand_as(x))
    assert torch.equal(at_site(model, tokens, Scale(**place, factor=3)), x * 3)
    assert torch.equal(at_site(model, tokens, Clamp(**place, low=0)), x.clamp(0))
    torch.testing.assert_close(
        at_site(model, tokens, Add(**place, vector=vector, scale=2, length="unit")), x + 2 * unit
    )
    torch.testing.assert_close(
        at_site(model, tokens, Add(**place, vector=vector, length="matched")), x + unit * length
    )
    kept = at_site(model, tokens, Add(**place, vector=vector, keep_norm=True))
    torch.testing.assert_close(kept.norm(dim=-1, keepdim=True), length)
    spanned = torch.stack((vector, 2 * vector, vector.roll(1)))
    out = at_site(model, tokens, ProjectOut(**place, directions=spanned))
    torch.testing.assert_close(out @ spanned.T, torch.zeros(2, 7, 3), atol=1e-5, rtol=0)
    q, _ = torch.linalg.qr(spanned[[0, 2]].T)
    torch.testing.assert_close(x - x @ q @ q.T, out, atol=1e-5, rtol=1e-5)
    other = capture(model, prompts(5, seed=9), STREAM)
    drawn = at_site(model, tokens, ResampleAblate(**place, source=other, seed=1))
    assert all(any(torch.equal(row, source) for source in other[STREAM, 1]) for row in drawn)
    mean = at_site(model, tokens, MeanAblate(**place, source=mean_activations(other)))
    torch.testing.assert_close(mean, other[STREAM, 1].mean((0, 1)).expand_as(x))
    moved = at_site(model, tokens, Patch(**place, positions=(4, 5), source_positions=(1, 2)))
    assert torch.equal(moved[:, 4:6], x[:, 1:3]) and torch.equal(moved[:, :4], x[:, :4])


def test_knockout_before_the_softmax_is_renormalised_knockout_after_it() -> None:
    model, tokens = tiny_model(), prompts()
    place = {"positions": (3, 4, 6), "keys": (1, 2), "heads": (0, 2)}
    before = model(tokens, hooks=to_hooks(AttentionKnockout(**place), model))
    after = model(tokens, hooks=to_hooks(AttentionKnockout(**place, when="after"), model))
    torch.testing.assert_close(before, after)
    pattern = at_site(model, tokens, AttentionKnockout(**place, when="after"))
    chosen = pattern[:, [0, 2]][:, :, [3, 4, 6]]
    assert bool((chosen[..., [1, 2]] == 0).all())
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 7))
    assert bool((pattern.triu(1) == 0).all()), "the causal mask is kept"


def test_cutting_everything_is_an_error_unless_asked_for() -> None:
    model, tokens = tiny_model(), prompts()
    with pytest.raises(RequestError, match="nothing to look at"):
        model(tokens, hooks=to_hooks(AttentionKnockout(keys=0), model))
    only_self = at_site(model, tokens, AttentionKnockout(keep_self=True, when="after"))
    torch.testing.assert_close(only_self, torch.eye(7).expand(2, 4, 7, 7))


def test_padding_on_either_side_gives_what_the_rows_alone_give() -> None:
    model = tiny_model("llama")
    short, long = prompts(1, 5, seed=1), prompts(1, 7, seed=2)
    source = capture(model, prompts(1, 7, seed=3), STREAM)
    edits = [
        Set(site=STREAM, layers=1, positions=-1, value=1.0),
        Add(site="resid.post_emb", positions=2, vector=torch.arange(16.0)),
        AttentionKnockout(positions=(3, 4), keys=(1,), when="after"),
        MeanAblate(site=STREAM, layers=0, positions=(1,), source=mean_activations(source)),
    ]
    for edit in edits:
        alone = [model(row, hooks=to_hooks(edit, model)) for row in (short, long)]
        for side in ("left", "right"):
            filler = torch.zeros(1, 2, dtype=torch.long)
            padded = torch.cat((filler, short) if side == "left" else (short, filler), 1)
            tokens = torch.cat((padded, long))
            pad = torch.zeros(2, 7, dtype=torch.bool)
            columns = slice(0, 2) if side == "left" else slice(5, 7)
            pad[0, columns] = True
            both = model(tokens, pad=pad, hooks=to_hooks(edit, model))
            torch.testing.assert_close(both[:1, ~pad[0]], alone[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(both[1:], alone[1], atol=1e-5, rtol=1e-5)


class Letters:
    """Each token is one letter; token 22 is two."""

    def token_bytes(self, token: int) -> bytes:
        return b"xy" if token == 22 else bytes([97 + token])


def test_positions_by_text() -> None:
    model = tiny_model()
    model.tokenizer = Letters()
    tokens = torch.tensor([[0, 1, 2, 1, 22, 4], [1, 2, 0, 0, 0, 22]])

    def rows(text: str | TokenText) -> list[list[int]]:
        out = at_site(model, tokens, Set(site=STREAM, layers=1, positions=text, value=77.0))
        return [(row[:, 0] == 77).nonzero()[:, 0].tolist() for row in out]

    assert rows("bc") == [[1, 2], [0, 1]]
    assert rows(TokenText(text="bc", part="last")) == [[2], [1]]
    assert rows("y") == [[4], [5]]
    assert rows(TokenText(text="b", which="all")) == [[1, 3], [0]]
    assert rows(TokenText(text="b", which="last")) == [[3], [0]]
    with pytest.raises(RequestError, match="row 0: the text 'b' occurs 2 times"):
        rows("b")
    with pytest.raises(RequestError, match="row 1: the text 'e' is not in the prompt"):
        rows("e")
    with pytest.raises(RequestError, match="pass to_hooks"):
        to_hooks(Zero(site=STREAM, positions="b"), model)


class Dictionary(nn.Module):
    """A tiny autoencoder with an error."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.into, self.out = (
            torch.randn(16, 30, generator=generator),
            torch.randn(30, 16, generator=generator),
        )

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.into).relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.out / 100


def test_an_edit_of_latents_moves_along_their_decoder_rows() -> None:
    model, tokens, dictionary = tiny_model(), prompts(), Dictionary()
    x = capture(model, tokens, STREAM)[STREAM, 1]
    one = EditLatents(
        site=STREAM, layers=1, positions=3, autoencoder="d", latents=(4, 7), operation="add", value=(1, 2)
    )
    out = at_site(model, tokens, one, autoencoders={"d": dictionary})
    expected = x.clone()
    expected[:, 3] += (dictionary.out[4] + 2 * dictionary.out[7]) / 100
    torch.testing.assert_close(out, expected)
    with pytest.raises(RequestError, match="no autoencoder is called 'd'"):
        at_site(model, tokens, one)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"operation": "set", "value": 2}, lambda z: torch.full_like(z, 2)),
        ({"operation": "scale", "value": 3}, lambda z: 3 * z),
        ({"operation": "cap", "value": 0.5}, lambda z: z.clamp(max=0.5)),
        ({"operation": "clamp", "low": 0.25, "high": 0.5}, lambda z: z.clamp(0.25, 0.5)),
        ({"operation": "clamp", "low": 0.25}, lambda z: z.clamp(min=0.25)),
        ({"operation": "ablate"}, torch.zeros_like),
    ],
)
def test_each_operation_on_latents(fields: dict, expected: object) -> None:
    model, tokens, dictionary = tiny_model(), prompts(), Dictionary()
    x = capture(model, tokens, STREAM)[STREAM, 1]
    edit = EditLatents(site=STREAM, layers=1, autoencoder="d", latents=(4, 7), **fields)
    change = expected(z := dictionary.encode(x)[..., [4, 7]]) - z
    assert change.abs().max() > 0
    moved = x + change @ dictionary.out[[4, 7]] / 100
    torch.testing.assert_close(at_site(model, tokens, edit, autoencoders={"d": dictionary}), moved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "'set' needs a value"),
        ({"operation": "ablate", "value": 1}, "'ablate' takes no value"),
        ({"operation": "clamp"}, "needs low, high or both"),
        ({"value": 1, "high": 2}, "for operation 'clamp'"),
    ],
)
def test_operations_on_latents_get_what_they_use(fields: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EditLatents(site=STREAM, layers=1, autoencoder="d", latents=4, **fields)


def test_freezing_everything_leaves_the_direct_effect() -> None:
    # with patterns, norm scales and MLP outputs held, what a head writes reaches the logits linearly; holding the
    # later attention outputs too leaves only the direct path, whose closed form is scale and unembedding
    model, tokens = tiny_model("llama"), prompts()
    reference = everything(model, tokens)
    frozen = [Freeze(site="norm_scale", source=reference), Freeze(site="mlp_output", source=reference)]
    frozen += [Freeze(site="attention_output", layers=2, source=reference)]
    vector = torch.randn(16, generator=torch.Generator().manual_seed(1))
    add = Add(site="resid.torso.delta_attn", layers=1, vector=vector)
    effect = model(tokens, hooks=to_hooks([*frozen, add], model)) - model(tokens)
    assert model.ln_f is not None and model.ln_f.weight is not None
    direct = vector / reference["resid.ln_f.scale", None] * model.ln_f.weight @ model.unembed.weight.T
    torch.testing.assert_close(effect, direct, atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    position=st.integers(-7, 6),
    head=st.integers(0, 3),
    layer=st.integers(0, 2),
    row=st.sampled_from([None, 0, 1]),
)
def test_places_are_what_they_say(position: int, head: int, layer: int, row: int | None) -> None:
    model, tokens = tiny_model(), prompts()
    one = Set(site="attn.v_out", layers=layer, positions=position, heads=head, rows=row, value=99.0)
    out = at_site(model, tokens, one, layer)
    expected = torch.zeros(2, 7, 4, dtype=torch.bool)
    expected[row if row is not None else slice(None), position, head] = True
    assert torch.equal((out == 99).all(-1), expected)


BAD = [
    ({"site": "resid.torso.pre_atn"}, "did you mean 'resid.torso.pre_attn'"),
    ({"site": STREAM, "layers": 7}, "layer 7 does not exist: the model has 3"),
    ({"site": STREAM, "heads": 0}, "has no heads"),
    ({"site": "mlp.expert_post_act"}, "runs once for each expert"),
    ({"site": "attn.v_out", "heads": 4}, "head 4 does not exist"),
    ({"site": "attn.rot_q"}, "never fires in this model"),
    ({"site": "logits", "layers": 0}, "belongs to no layer"),
    ({"site": STREAM, "positions": ()}, "no position is named"),
    ({"site": STREAM, "positions": 12}, "position 12 does not exist"),
    ({"site": "mlp.post_act", "units": 24}, "unit 24 does not exist"),
    ({"site": STREAM, "layer": 2}, "Extra inputs are not permitted"),
]


@pytest.mark.parametrize("fields,message", BAD)
def test_what_does_not_fit_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        to_hooks(Zero(**fields), tiny_model())


def test_sources_that_do_not_fit_are_refused() -> None:
    model, tokens = tiny_model(), prompts()
    with pytest.raises(RequestError, match=r"no activation 'resid\.torso\.pre_attn, layer 2'"):
        to_hooks(Patch(site=STREAM, layers=2, source=capture(model, tokens, STREAM, layers=1)), model)
    with pytest.raises(RequestError, match="does not fit"):
        to_hooks(
            Patch(site=STREAM, source=capture(model, tokens, "mlp.post_act"), source_site="mlp.post_act"),
            model,
        )
    with pytest.raises(RequestError, match=r"value .* does not fit"):
        to_hooks(Set(site=STREAM, value=torch.ones(5)), model)
    with pytest.raises(RequestError, match="3 rows and the run 2"):
        model(tokens, hooks=to_hooks(Patch(site=STREAM, source=capture(model, prompts(3), STREAM)), model))
    with pytest.raises(HookError, match="only 4 positions"):
        short = Patch(site=STREAM, positions=5, source=capture(model, prompts(2, 4), STREAM))
        model(tokens, hooks=to_hooks(short, model))
    source = torch.ones(16)
    held = Set(site=STREAM, value=source)
    source.zero_()
    with pytest.raises(HookError, match="edited in place"):
        model(tokens, hooks=to_hooks(held, model))


def test_damaged_files_are_refused(tmp_path) -> None:
    path = tmp_path / "one.json"
    save_interventions(Set(site=STREAM, value=torch.ones(16)), path)
    text = path.read_text()
    path.write_text(text.replace('"set"', '"reset"'))
    with pytest.raises(RequestError, match="kind"):
        load_interventions(path)
    path.write_text(text)
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(RequestError, match=r"is not in one\.safetensors"):
        load_interventions(path)
    path.write_text("{")
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        load_interventions(path)
