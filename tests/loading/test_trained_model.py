"""A language model that was truly trained (SmolLM2-135M-Instruct): what holds for random weights holds for it, and it
can judge."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_lens.explain.judge_check import check_judge
from neuron_lens.explain.puzzles import puzzles
from neuron_lens.explain.scorers import Detection
from neuron_lens.llm import JinjaTemplate, LocalBackend, Message
from neuron_lens.loading.verify import verify
from neuron_lens.transformer import Transformer

PEER = Path(__file__).parents[2] / ".peers" / "smollm2"
PYTHON = PEER / "bin" / "python"
CHECKPOINT = PEER / "SmolLM2-135M-Instruct"

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON.exists(), reason="no peer environment: scripts/peer_env smollm2"),
]
TEXTS = [
    "The capital of France is Paris.",
    "def f(self, x=1984):\n    return x**2  # naïve\n",
    "  two  spaces\tand 3.14159, don't; e.g. 2026-11-21 😀 漢字",
    "<|im_start|> is no token here",
]
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
    [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))],
]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "asked.json").write_text(json.dumps({"texts": TEXTS[:3], "chats": CHATS}))
    command = [
        str(PYTHON), str(Path(__file__).with_name("smollm2_peer.py")), str(CHECKPOINT),
        str(folder / "asked.json"), str(folder / "said.json"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "said.json").read_text())


@pytest.fixture(scope="module")
def model(said: Any) -> Transformer:
    return Transformer.load(CHECKPOINT).eval()


def test_it_computes_what_transformers_computes(said: Any) -> None:
    found = verify(CHECKPOINT)
    assert found.passed, str(found)


def test_it_knows(model: Transformer) -> None:
    made = model.sample("The capital of France is", max_new_tokens=3, temperature=0)
    assert made.text is not None and made.text.startswith(" Paris")


def test_texts_and_chats_are_those_of_transformers(model: Transformer, said: Any) -> None:
    assert [model.tokenizer.encode(text) for text in TEXTS[:3]] == said["ids"]
    special = set(model.tokenizer.special_tokens.values())
    assert not special & set(model.tokenizer.encode(TEXTS[3]))
    template = LocalBackend(model).template
    assert isinstance(template, JinjaTemplate)
    written = [
        "".join(text for part in template.pieces([Message(**turn) for turn in chat]) for text, _ in part)
        for chat in CHATS
    ]
    assert written == said["chats"]


def test_parts_sum_to_the_whole(said: Any) -> None:
    """In a stream where some directions are thousands of times larger than others, as training makes them."""
    from neuron_lens.faces.hooked_transformer import HookedTransformer

    opened = HookedTransformer.from_pretrained_no_processing(str(CHECKPOINT))
    with torch.no_grad():
        logits, cache = opened.run_with_cache(TEXTS[1])
        parts = cache.decompose_resid(layer=-1, mode="all")
        whole = cache["resid_post", -1]
        assert whole.abs().max() > 30 * whole.abs().median()
        torch.testing.assert_close(parts.sum(0), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
        same = opened.run_with_hooks(
            TEXTS[1],
            fwd_hooks=[(name, lambda x, hook: cache[hook.name]) for name in cache if "mlp_out" in name],
        )
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-3)


def test_it_judges_every_text_it_is_asked(model: Transformer) -> None:
    """All its answers can be read. That they are right is not held: this model is too small to judge well."""
    (check,) = check_judge(
        LocalBackend(model),
        [Detection(n_firing=4, n_silent=5, batch=3)],
        chosen=puzzles()[:2],
        progress=False,
    )
    assert check.coverage == 1.0
    assert all(score.n == 9 for one in check.puzzles for score in (one.true, *one.false))
