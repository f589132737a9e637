"""Text in and out, and the tools that start from text."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from conftest import strong_model, tiny_config

from neuron_lens.errors import NeuronLensError, RequestError
from neuron_lens.faces.hooked_transformer import HookedTransformer, get_act_name
from neuron_lens.faces.hooked_transformer.evals import (
    evaluate_on_dataset,
    induction_loss,
    make_text_loader,
    sanity_check,
)
from neuron_lens.faces.hooked_transformer.head_detector import HEAD_NAMES, detect_head
from neuron_lens.faces.hooked_transformer.svd_interpreter import SVDInterpreter
from neuron_lens.faces.hooked_transformer.train import HookedTransformerTrainConfig, train
from neuron_lens.faces.hooked_transformer.utils import LocallyOverridenDefaults, sample_logits, test_prompt
from neuron_lens.tokenizers import bytes_tokenizer


@pytest.fixture(scope="module")
def lens() -> HookedTransformer:
    tokenizer = bytes_tokenizer()
    return HookedTransformer.from_engine(
        strong_model(tiny_config(d_vocab=tokenizer.vocab_size)), tokenizer=tokenizer
    )


def test_bos_once_and_no_silent_cut(lens: HookedTransformer) -> None:
    bos = lens._need_tokenizer().bos_id
    assert bos is not None
    tokens = lens.to_tokens("abc")
    assert tokens.tolist() == [[bos, 97, 98, 99]]
    assert lens.to_tokens(lens.to_string(tokens[0])).tolist() == tokens.tolist(), "BOS doubled"
    assert lens.to_tokens("abc", prepend_bos=False).tolist() == [[97, 98, 99]]
    with pytest.raises(RequestError, match="context of 32"):
        lens.to_tokens("x" * 40)
    assert lens.to_tokens("x" * 40, truncate=True).shape == (1, 32)
    assert lens.to_string(lens.to_tokens(["ab", "cd"], prepend_bos=False)) == ["ab", "cd"]
    assert lens.to_str_tokens("ab", prepend_bos=False) == ["a", "b"] and lens.to_str_tokens(tokens[0])[
        1:
    ] == ["a", "b", "c"]
    with LocallyOverridenDefaults(lens, prepend_bos=False):
        assert lens.to_tokens("a").shape == (1, 1)
    assert lens.to_tokens("a").shape == (1, 2)


def test_the_tokenizer_has_the_names_people_use(lens: HookedTransformer) -> None:
    tokenizer = lens.tokenizer
    assert (
        tokenizer.bos_token_id == lens.to_tokens("a")[0, 0]
        and tokenizer.decode(tokenizer.bos_token_id) == tokenizer.bos_token
    )
    assert tokenizer.batch_decode(torch.tensor([[97, 98]])) == ["ab"] and tokenizer.encode(
        "ab", add_special_tokens=False
    ) == [97, 98]
    lens.tokenizer = tokenizer
    assert lens.to_single_token("a") == 97


def test_single_tokens(lens: HookedTransformer) -> None:
    assert lens.to_single_token("a") == 97 and lens.to_single_str_token(98) == "b"
    assert (
        lens.get_token_position("b", "abcb") == 2 and lens.get_token_position("b", "abcb", mode="last") == 4
    )
    assert torch.equal(lens.tokens_to_residual_directions("a"), lens.W_U[:, 97])
    for call, says in (
        (lambda: lens.to_single_token("ab"), "2 tokens"),
        (lambda: lens.get_token_position("z", "abc"), "not in the prompt"),
        (lambda: lens.tokens_to_residual_directions(9999), "token ids"),
        (lambda: lens.to_tokens([]), "at least one text"),
        (lambda: lens.to_tokens("", prepend_bos=False), "no tokens"),
    ):
        with pytest.raises(NeuronLensError, match=says):
            call()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_texts_give_what_each_gives_alone(lens: HookedTransformer, side: str) -> None:
    texts = ["a longer text", "short"]
    with torch.no_grad():
        losses = lens(texts, return_type="loss", loss_per_token=True, padding_side=side).sum(-1)
        # ids padded by the model's own rules are recognised as such
        lens.padding_side = side  # type: ignore[assignment]
        ids = lens(lens.to_tokens(texts), return_type="loss", loss_per_token=True).sum(-1)
        alone = torch.stack([lens(text, return_type="loss", loss_per_token=True).sum() for text in texts])
    lens.padding_side = "right"
    assert torch.allclose(losses, alone, atol=1e-3) and torch.allclose(ids, alone, atol=1e-3)


def test_generation_from_text(lens: HookedTransformer) -> None:
    batch = lens.generate(["ab", "a longer one"], max_new_tokens=4, do_sample=False, return_type="tokens")
    alone = lens.generate("ab", max_new_tokens=4, do_sample=False, return_type="tokens")
    assert batch[0, -4:].tolist() == alone[0, -4:].tolist()
    text = lens.generate("ab", max_new_tokens=4, do_sample=False)
    assert isinstance(text, str) and text.startswith("ab")
    streamed = list(
        lens.generate_stream(
            "ab", max_new_tokens=4, do_sample=False, max_tokens_per_yield=3, return_type="tokens"
        )
    )
    assert torch.equal(torch.cat(streamed, 1), alone)


def test_prompts_are_tested(lens: HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    found = test_prompt("one two", "x", lens, prepend_space_to_answer=False)
    with torch.no_grad():
        probs = lens("one two")[0, -1].softmax(-1)
    assert math.isclose(found[0]["probability"], float(probs[ord("x")]), rel_tol=1e-3)
    assert found[0]["rank"] == int((probs > probs[ord("x")]).sum()) and "rank" in capsys.readouterr().out


def test_heads_are_detected(lens: HookedTransformer) -> None:
    text = "abcabc"
    tokens = lens.to_tokens(text)
    n = tokens.shape[1]
    with lens.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: _previous(x))]):
        scores = detect_head(lens, text, "previous_token_head", exclude_bos=False)
    # the first token can only look at itself
    assert torch.allclose(scores[1], torch.full((4,), (n - 1) / n)) and float(scores[[0, 2]].max()) < 0.8
    for name in HEAD_NAMES:
        some = detect_head(lens, [text, "xyxyxy"], name, heads=[(0, 1)], error_measure="abs")
        assert some[0, 1] <= 1 and int((some == -1).sum()) == 11
    with pytest.raises(RequestError, match="must be one of"):
        detect_head(lens, text, "next_token_head")


def _previous(pattern: torch.Tensor) -> torch.Tensor:
    n = pattern.shape[-1]
    wanted = torch.diag(torch.ones(n - 1), -1)
    wanted[0, 0] = 1
    return wanted.expand_as(pattern).clone()


def test_singular_vectors(lens: HookedTransformer) -> None:
    found = SVDInterpreter(lens)
    vectors = found.get_singular_vectors("OV", 1, num_vectors=3, head_index=2)
    ov = (lens.blocks[1].attn.W_V[2] @ lens.blocks[1].attn.W_O[2]).detach()
    expected = torch.linalg.svd(ov).Vh[:3] @ lens.W_U.detach()
    assert vectors.shape == (lens.cfg.d_vocab, 1, 3)
    assert torch.allclose(vectors[:, 0].abs(), expected.T.abs(), atol=1e-3)
    assert found.get_singular_vectors("w_in", 0, 2).shape == found.get_singular_vectors("w_out", 0, 2).shape
    with pytest.raises(RequestError, match="head_index"):
        found.get_singular_vectors("OV", 0, num_vectors=2)


def test_evaluations(lens: HookedTransformer) -> None:
    expected = lens("some words", return_type="loss").item()
    assert sanity_check(lens, "some words") == pytest.approx(expected)
    batches = list(make_text_loader(lens, ["a text of words"] * 20, batch_size=4))
    assert all(batch["tokens"].shape[1] == 32 for batch in batches)
    assert evaluate_on_dataset(lens, batches, truncate=2) > 0
    assert induction_loss(lens, batch_size=2, subseq_len=10) > 0
    with pytest.raises(RequestError, match="lower subseq_len"):
        induction_loss(lens)


def test_training() -> None:
    lens = HookedTransformer(
        {"n_layers": 1, "d_model": 16, "n_ctx": 12, "d_head": 8, "attn_only": True, "d_vocab": 10, "seed": 1}
    )
    rows = torch.arange(10).repeat(4, 1)
    losses = train(
        lens, HookedTransformerTrainConfig(num_epochs=15, batch_size=2, lr=0.02, max_grad_norm=1.0), rows
    )
    assert len(losses) == 30 and losses[-1] < losses[0] / 2


def test_sampling_from_logits() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]]).repeat(200, 1)
    assert bool((sample_logits(logits, temperature=0.0) == 1).all()) and bool(
        (sample_logits(logits, top_k=1) == 1).all()
    )
    torch.manual_seed(0)
    assert sample_logits(logits * 0).unique().tolist() == [0, 1, 2]
    with pytest.raises(RequestError, match="tokens="):
        sample_logits(logits, freq_penalty=1.0)


def test_short_names() -> None:
    assert (
        get_act_name("k", 6, "a") == "blocks.6.attn.hook_k"
        and get_act_name("pre5") == "blocks.5.mlp.hook_pre"
    )
    assert (
        get_act_name("embed") == "hook_embed"
        and get_act_name("normalized", 27, "ln2") == "blocks.27.ln2.hook_normalized"
    )
    assert (
        get_act_name("scale4ln1") == "blocks.4.ln1.hook_scale"
        and get_act_name("resid_pre", 0) == "blocks.0.hook_resid_pre"
    )


SCRIPT = """
from neuron_lens.compat import install_as_transformer_lens
install_as_transformer_lens()
import transformer_lens
import transformer_lens.utils as utils
from transformer_lens import ActivationCache, FactoredMatrix, HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookedRootModule, HookPoint
import torch
cfg = HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=9, act_fn="relu", device="cpu")
model = HookedTransformer(cfg)
logits, cache = model.run_with_cache(torch.arange(5)[None])
assert isinstance(cache, ActivationCache) and cache[utils.get_act_name("resid_pre", 0)].shape == (1, 5, 8)
try:
    transformer_lens.HookedEncoder
except AttributeError as error:
    assert "encoder models" in str(error)
else:
    raise SystemExit("HookedEncoder is not refused")
try:
    from transformer_lens import Nonsense
except ImportError:
    pass
else:
    raise SystemExit("anything goes")
assert install_as_transformer_lens() is transformer_lens
"""


def test_scripts_for_transformer_lens_run() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
