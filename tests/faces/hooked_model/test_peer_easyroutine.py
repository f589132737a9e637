"""On the same checkpoints and prompts our numbers are easyroutine 1.1.5's, wherever its own are right: one row at a time."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from neuron_lens.faces.hooked_model import ActivationCache, ExtractionConfig, HookedModel, Intervention

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".peers" / "easyroutine" / "bin" / "python"
SCRIPT = HERE / "easyroutine_peer.py"
CHECKPOINT = "hf-internal-testing/tiny-random-LlamaForCausalLM"

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON.exists(), reason="no peer environment: scripts/peer_env easyroutine"),
]
PROMPTS = {"long": [3, 9, 1, 14, 7, 20, 2], "short": [5, 11, 8, 2, 6]}
FIELDS = [
    *("embed", "resid_in", "resid_out", "attn_in", "attn_out", "mlp_out", "resid_in_post_layernorm"),
    *("queries", "keys", "values", "head_queries", "head_out", "head_values_projected"),
    *("attn_pattern", "last_layernorm"),
]
CONFIG = ExtractionConfig(**{f"extract_{field}": True for field in FIELDS})
# As the peer asks. It zeroes streams whatever the factor, so only patterns are scaled.
REQUESTS: dict[str, Intervention] = {
    "stream": Intervention(activation="resid_out_0", token_positions=["last"]),
    "attention": Intervention(activation="attn_out_1", token_positions=[2]),
    "mlp": Intervention(activation="mlp_out_1", token_positions=["all"]),
    "keys": Intervention(activation="keys_L1", token_positions=[1]),
    "columns": Intervention(activation="pattern_L1H2", type="columns", token_positions=[1, 2]),
    "halved": Intervention(
        activation="pattern_L1H2", type="columns", token_positions=[1], multiplication_value=0.5
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and what the peer found."""
    made = tmp_path_factory.mktemp("easyroutine")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), str(SCRIPT), str(made)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def opened(folder: Path, heads: str) -> tuple[HookedModel, dict[str, Tensor]]:
    """Our model of a checkpoint, and the peer's tensors of it."""
    from neuron_lens.transformer import Transformer

    model = Transformer.load(str(folder / heads / CHECKPOINT), tokenizer=None)
    return HookedModel(model), load_file(folder / f"{heads}.safetensors")


def flat(cache: ActivationCache) -> dict[str, Tensor]:
    """Tensors by key, the statistics of the final norm by their names."""
    moments = {f"last_layernorm.{name}": x for name, x in cache["last_layernorm"].items()}
    return {key: x for key, x in cache.items() if isinstance(x, Tensor)} | moments


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], under: str, without: Any = ()) -> None:
    """Every key the peer found is ours, with its values."""
    found = {key.removeprefix(under): x for key, x in theirs.items() if key.startswith(under)}
    assert len(found) > 50
    for key, expected in found.items():
        if key not in without:
            torch.testing.assert_close(
                ours[key], expected, atol=2e-4, rtol=2e-4, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("prompt", list(PROMPTS))
@pytest.mark.parametrize("heads", ["equal", "grouped"])
def test_what_is_extracted(folder: Path, heads: str, prompt: str) -> None:
    model, theirs = opened(folder, heads)
    ids = torch.tensor([PROMPTS[prompt]])
    for request, where in (("plain", ["all"]), ("spans", ["last", (1, 3), 0])):
        ours = flat(model.forward(ids, where, extraction_config=CONFIG))
        compare(ours, theirs, f"{prompt}/{request}/")


@pytest.mark.parametrize("prompt", list(PROMPTS))
@pytest.mark.parametrize("heads", ["equal", "grouped"])
@pytest.mark.parametrize("request_", list(REQUESTS))
def test_what_interventions_leave(folder: Path, heads: str, prompt: str, request_: str) -> None:
    model, theirs = opened(folder, heads)
    one = REQUESTS[request_]
    where = ["all", *(group for group in one.token_positions if group != "all")]
    ids = torch.tensor([PROMPTS[prompt]])
    ours = flat(model.forward(ids, where, extraction_config=CONFIG, interventions=[one]))
    # the peer records what enters the intervention, we what leaves it
    compare(ours, theirs, f"{prompt}/{request_}/", without=[one.activation])
    plain = flat(model.forward(ids, where, extraction_config=CONFIG))
    assert not torch.allclose(ours["logits"], plain["logits"], atol=1e-2)
