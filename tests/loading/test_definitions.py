"""A definition file is right, or refused with the line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuron_lens.errors import ConfigError
from neuron_lens.loading import known_models
from neuron_lens.loading.definitions import Transform, read_definition
from neuron_lens.loading.registry import definitions
from neuron_lens.loading.transforms import apply_transforms
from neuron_lens.transformer import ExpertsConfig, RotaryConfig, Transformer, TransformerConfig

HEAD = 'title = "Toy"\narchitectures = ["ToyForCausalLM"]\n'
WTE = '"wte" = "embed.weight"\n'


def write(folder: Path, text: str, name: str = "toy") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_definition(write(folder, text))
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            '"a" = ["transposed", "b.weight"]',
            "toy.toml:5: unknown transform 'transposed': did you mean 'transpose'?",
        ),
        ('"a" = ["split", "{q,k}.weight"]', "toy.toml:5: transform 'split': takes 1 to 2 numbers"),
        ('"a" = ["split(x)", "{q,k}.weight"]', "toy.toml:5: transform 'split(x)': its arguments are numbers"),
        ('"a" = ["split(3)", "{q,k}.weight"]', "toy.toml:5: 'a': split(3) makes 3 tensors, named are 2"),
        ('"a" = "{q,k}.weight"', "toy.toml:5: 'a': no transform makes 1 tensors, named are 2"),
        ('"h.{layer}.a" = "b.weight"', "toy.toml:5: 'h.{layer}.a' -> 'b.weight'"),
        ('"h.{floor}.a" = "b.weight"', "toy.toml:5: 'h.{floor}.a': unknown placeholder ['floor']"),
        (
            '"e.{expert}.a" = "b.weight"',
            "toy.toml:5: 'e.{expert}.a': {expert} or {head} and the transform 'stack'",
        ),
        ('"a" = 3', "toy.toml:5: 'a' = 3: expected a name"),
        ('"other" = "embed.weight"', "toy.toml:5: 'embed.weight' is already filled by 'wte' (toy.toml:4)"),
        ('"wte" = "unembed.weight"', "line 5"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(tmp_path: Path, row: str, expected: str) -> None:
    assert expected in refusal(tmp_path, f"{HEAD}[tensors]\n{WTE}{row}\n")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('d_mlp = { from = "x", convert = "sqroot" }', "toy.toml:4: d_mlp: unknown conversion 'sqroot'"),
        ('d_mlp = { from = "x", convertt = "sqrt" }', "toy.toml:4: d_mlp: unknown options ['convertt']"),
        ("d_mlp = 3", "a fixed value belongs in [choices]"),
    ],
)
def test_a_wrong_field_is_refused_with_its_line(tmp_path: Path, row: str, expected: str) -> None:
    assert expected in refusal(tmp_path, f"{HEAD}[config]\n{row}\n[tensors]\n{WTE}")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = refusal(tmp_path, f'tittle = "Toy"\n[tensors]\n{WTE}"a" = ["spin", "b"]\n')
    for part in ("unknown key 'tittle'", "'title' is missing", "'architectures' is missing", "toy.toml:4"):
        assert part in text


def test_a_file_based_on_another_overrides_it(tmp_path: Path) -> None:
    base = f'{HEAD}ignored = ["a"]\n[choices]\nnorm = "rms"\n[config]\nd_mlp = "wide"\n[tensors]\n{WTE}"q" = "b.q"\n"k" = "b.k"\n'
    write(tmp_path, base, "base")
    own = f'{HEAD}based_on = "base"\nignored = ["b"]\n[choices]\nd_mlp = 7\n[config]\nnorm = "kind"\n'
    read = read_definition(write(tmp_path, own + '[tensors]\n"qk" = ["split(2)", "b.{q,k}"]\n'))
    assert read.ignored == ("a", "b")
    assert read.choices == {"d_mlp": 7} and list(read.config) == ["norm"]
    assert [rule.pattern for rule in read.tensors] == ["wte", "qk"]


def test_a_file_based_on_itself(tmp_path: Path) -> None:
    assert "based on itself" in refusal(tmp_path, f'{HEAD}based_on = "toy"\n[tensors]\n{WTE}')


def every_parameter() -> set[str]:
    """The names of all parameters any configuration has, with {layer} for the layer."""
    shared = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_mlp": 8, "d_vocab": 4, "n_ctx": 4, "tied": False}
    experts = ExpertsConfig(n_experts=2, n_used=1, bias=True, router_bias=True)
    with torch.device("meta"):
        models = [
            Transformer(TransformerConfig(**shared, **more), seed=None)
            for more in (
                {"embedding_norm": True, "norm_place": "sandwich", "qk_norm": "head", "unembed_bias": True},
                {
                    "mlp": "gated",
                    "attention_sinks": True,
                    "position": "rotary",
                    "rotary": RotaryConfig(dims=4),
                },
                {"mlp": "experts", "experts": experts},
            )
        ]
    return {
        name.replace("blocks.0.", "blocks.{layer}.")
        for model in models
        for name, _ in model.named_parameters()
    }


def test_every_target_of_a_shipped_file_exists() -> None:
    known = every_parameter()
    for definition in definitions():
        for rule in definition.tensors:
            assert set(rule.targets) <= known, rule.place


def test_known_models_are_listed_once_by_title() -> None:
    models = known_models()
    titles = [model.title for model in models]
    assert titles == sorted(set(titles), key=str.lower)
    assert all(model.architectures and model.examples for model in models)


CONFIG = TransformerConfig(
    n_layers=1, d_model=8, n_heads=4, n_kv_heads=2, d_head=3, d_mlp=8, d_vocab=4, n_ctx=4
)


def test_split_by_head_undoes_interleaving() -> None:
    q, k, v = torch.randn(4, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    rows = [row for group in range(2) for row in (q[2 * group], q[2 * group + 1], k[group], v[group])]
    parts = apply_transforms([torch.cat(rows)], (Transform("split_qkv_by_head"),), CONFIG)
    for part, whole in zip(parts, (q, k, v), strict=True):
        assert torch.equal(part, whole.flatten(0, 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_alternate_undoes_dealing(axis: int) -> None:
    parts = [torch.randn(6, 4), torch.randn(6, 4)]
    dealt = torch.stack(parts, axis + 1).flatten(axis, axis + 1)
    for part, whole in zip(
        apply_transforms([dealt], (Transform("alternate", (2, axis)),), CONFIG), parts, strict=True
    ):
        assert torch.equal(part, whole)


def test_offset_split_and_stack_follow_each_other() -> None:
    given = [torch.randn(6, 2), torch.randn(6, 2)]
    made = apply_transforms(
        given, (Transform("offset", (1,)), Transform("stack"), Transform("split", (2, 1))), CONFIG
    )
    assert torch.equal(torch.cat(made, 1), torch.stack(given) + 1)
