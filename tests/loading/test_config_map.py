"""Config files as they lie on the hub, in the spelling of transformers 4, mean what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neuron_lens.errors import CheckpointError
from neuron_lens.loading.config_map import map_config
from neuron_lens.loading.registry import definition_for
from neuron_lens.transformer import TransformerConfig

from .families import quiet

FILES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("config_files.json").read_text())


def mapped(raw: dict[str, Any]) -> TransformerConfig:
    return map_config(raw, definition_for(raw, "config.json"), source="config.json")


@pytest.mark.parametrize("name", FILES)
def test_old_spelling_equals_the_new_one(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(FILES[name]))
    with quiet():
        new = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert new.keys() - FILES[name].keys(), "the new spelling differs, or this shows nothing"
    assert mapped(FILES[name]) == mapped(new)


def test_windows_and_bases_of_layers() -> None:
    config = mapped(FILES["gemma-3-1b"])
    assert [config.window(layer) for layer in range(6)] == [512] * 5 + [None]
    assert config.rotary is not None
    assert (config.rotary.base, config.rotary.local_base) == (1e6, 1e4)
    assert [mapped(FILES["gemma-2-2b"]).window(layer) for layer in range(4)] == [4096, None, 4096, None]
    assert mapped(FILES["qwen2.5-0.5b"]).windows == ()
    assert set(mapped(FILES["mistral-7b-v0.1"]).windows) == {4096}


def problem(name: str, **changed: Any) -> str:
    raw = {**FILES[name], **changed}
    with pytest.raises(CheckpointError) as caught:
        mapped({field: value for field, value in raw.items() if value != "absent"})
    return str(caught.value)


def test_unknown_and_missing_fields_are_named_at_once() -> None:
    message = problem("llama-3.2-1b", rope_flavour="sour", extra_norm=True, vocab_size="absent")
    for part in ("config.json", "rope_flavour", "extra_norm", "vocab_size is missing", "llama.toml"):
        assert part in message


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("opt-125m", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ("llama-3.2-1b", {"hidden_act": "swoosh"}, "'swoosh' is unknown"),
        ("llama-3.2-1b", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is unknown"),
        ("llama-3.2-1b", {"rope_scaling": {"type": "linear", "factor": 2.0, "spin": 1}}, "spin"),
        ("llama-3.2-1b", {"rope_scaling": {"rope_type": "llama3"}}, "not as expected"),
        ("llama-3.2-1b", {"num_key_value_heads": 5}, "must divide"),
        ("gemma-2-2b", {"layer_types": ["sideways"] * 26}, "'sideways' is unknown"),
        ("gemma-2-2b", {"layer_types": ["full_attention", "sliding_attention"]}, "2 entries for 26 layers"),
        ("gpt-neo-125m", {"attention_layers": "absent"}, "attention_layers is missing"),
    ],
)
def test_values_without_a_part_are_refused(name: str, changed: dict[str, Any], expected: str) -> None:
    assert expected in problem(name, **changed)
