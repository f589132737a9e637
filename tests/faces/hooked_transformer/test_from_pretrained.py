"""Loading: from objects and folders, processed or not, without touching what was given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_lens.errors import NeuronLensError
from neuron_lens.faces.hooked_transformer import HookedTransformer

sys.path.insert(0, str(Path(__file__).parent))
families = pytest.importorskip("families")
pytest.importorskip("transformers")

TOKENS = torch.tensor(families.TOKENS)


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def hf_model(request: pytest.FixtureRequest) -> Any:
    return families.make(request.param)


def test_an_object_is_loaded_and_left_as_it_is(hf_model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}
    with torch.no_grad():
        expected = hf_model(TOKENS).logits
        raw = HookedTransformer.from_pretrained_no_processing("mine", hf_model=hf_model)
        processed = HookedTransformer.from_pretrained("mine", hf_model=hf_model)
        assert torch.allclose(raw(TOKENS), expected, atol=1e-4)
        assert torch.allclose(processed(TOKENS).log_softmax(-1), expected.log_softmax(-1), atol=1e-4)
        for parameter in [*raw.parameters(), *processed.parameters()]:
            parameter.zero_()
    after = hf_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert processed.cfg.normalization_type in ("LNPre", "RMSPre") and raw.cfg.model_name == "mine"


def test_a_folder_and_its_parts(hf_model: Any, tmp_path: Path) -> None:
    hf_model.save_pretrained(tmp_path)
    whole = HookedTransformer.from_pretrained_no_processing(str(tmp_path))
    cut = HookedTransformer.from_pretrained_no_processing(str(tmp_path), first_n_layers=2)
    with torch.no_grad():
        assert torch.allclose(cut(TOKENS, stop_at_layer=2), whole(TOKENS, stop_at_layer=2), atol=1e-5)
    assert (
        len(cut.blocks) == 2
        and HookedTransformer.from_pretrained(str(tmp_path), dtype="bfloat16").W_E.dtype == torch.bfloat16
    )


def test_states_travel(hf_model: Any) -> None:
    processed = HookedTransformer.from_pretrained("mine", hf_model=hf_model)
    other = HookedTransformer.from_pretrained("mine", hf_model=hf_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
        other.load_state_dict(processed.state_dict())
        assert torch.equal(other(TOKENS), processed(TOKENS))
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        other.load_state_dict({**processed.state_dict(), "blocks.9.attn.W_Q": torch.zeros(1)})


def test_a_classic_state_dict_of_a_folded_model(hf_model: Any) -> None:
    processed = HookedTransformer.from_pretrained("mine", hf_model=hf_model)
    # as the original saves it: folded norms have no weights, attention has buffers
    state = {
        name: t for name, t in processed.state_dict().items() if ".ln1." not in name and ".ln2." not in name
    }
    state = {name: t.clone() for name, t in state.items() if not name.startswith("ln_final")}
    state["blocks.0.attn.mask"], state["blocks.0.attn.IGNORE"] = torch.ones(32, 32), torch.tensor(-1e5)
    with torch.no_grad():
        expected = processed(TOKENS)
        for parameter in processed.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        processed.load_state_dict(state)
        assert torch.equal(processed(TOKENS), expected)


def test_options_that_do_not_exist(hf_model: Any) -> None:
    for options, says in (
        ({"n_devices": 2}, "n_devices"),
        ({"fold_layernorm": True}, "fold_layernorm"),
        ({"first_n_layers": 9}, "first_n_layers"),
        ({"checkpoint_index": 3}, "revision"),
    ):
        with pytest.raises(NeuronLensError, match=says):
            HookedTransformer.from_pretrained("mine", hf_model=hf_model, **options)
