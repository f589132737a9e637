"""The helpers people import from utils, and the stand-in for transformer_lens that offers them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import strong_model, tiny_config
from torch import nn

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer import HookedTransformer, utils
from neuron_lens.tokenizers import bytes_tokenizer


@pytest.mark.parametrize("shape", [(40, 60), (4, 50, 20)])
def test_initial_weights_have_the_deviation_they_say(shape: tuple[int, ...]) -> None:
    fan_in, fan_out = utils.calc_fan_in_and_fan_out(torch.empty(shape))
    assert (fan_in, fan_out) == ((40, 60) if len(shape) == 2 else (50, 80))
    torch.manual_seed(0)
    for draw, deviation in (
        (utils.init_xavier_uniform_, math.sqrt(2 / (fan_in + fan_out))),
        (utils.init_xavier_normal_, math.sqrt(2 / (fan_in + fan_out))),
        (utils.init_kaiming_uniform_, math.sqrt(2 / fan_in)),
        (utils.init_kaiming_normal_, math.sqrt(2 / fan_in)),
    ):
        assert draw(torch.empty(shape), gain=3.0).std() == pytest.approx(3 * deviation, rel=0.1)
    by_outputs = utils.init_kaiming_normal_(torch.empty(shape), nonlinearity="linear", mode="fan_out")
    assert by_outputs.std() == pytest.approx(math.sqrt(1 / fan_out), rel=0.1)
    with pytest.raises(RequestError, match="1 to 3 dimensions"):
        utils.calc_fan_in_and_fan_out(torch.empty(()))
    with pytest.raises(RequestError, match="fan_in"):
        utils.init_kaiming_normal_(torch.empty(shape), mode="fan")


def test_estimates_cover_what_they_should() -> None:
    generator = torch.Generator().manual_seed(1)
    covered, small = 0, 0
    for _ in range(60):
        sample = torch.randn(25, generator=generator) + 2.0
        low, high = utils.bootstrap_ci(sample, confidence=0.9, n_resamples=200)
        assert low < float(sample.mean()) < high
        covered += low < 2.0 < high
        small += utils.sign_flip_permutation_pvalue(sample - 2.0, n_resamples=200) < 0.1
    assert 45 <= covered <= 60 and small <= 15
    assert utils.standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    # all 2^3 sign patterns: only the two that keep all signs alike are as large
    assert utils.sign_flip_permutation_pvalue(torch.tensor([1.0, 2.0, 3.0])) == 2 / 8
    low, high = utils.success_rate_ci(0, 10)
    assert low == 0.0 and high == pytest.approx(0.2775, abs=1e-3)
    for call in (
        lambda: utils.standard_error(torch.ones(1)),
        lambda: utils.success_rate_ci(3, 2),
        lambda: utils.bootstrap_ci(torch.ones(3), confidence=2.0),
    ):
        with pytest.raises(RequestError):
            call()


def test_texts_become_rows_of_ids(tmp_path: Path) -> None:
    lines = [{"text": "one text", "more": 1}, {"text": "another", "more": 2}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = utils.get_dataset(str(tmp_path / "texts.jsonl"))
    assert texts["text"] == ["one text", "another"] and texts[1] == {"text": "another"} and len(texts) == 2
    assert utils.keep_single_column(lines, "text") == list(texts)
    tokenizer = bytes_tokenizer()
    rows = utils.tokenize_and_concatenate(texts, tokenizer, max_length=5)
    ids = [*b"one text", tokenizer.eos_id, *b"another"]
    assert rows["tokens"].tolist() == [[tokenizer.bos_id, *ids[i : i + 4]] for i in range(0, 16, 4)]
    batch = next(iter(torch.utils.data.DataLoader(rows, batch_size=3)))
    assert torch.equal(batch["tokens"], rows["tokens"][:3])
    lens = HookedTransformer.from_engine(
        strong_model(tiny_config(d_vocab=tokenizer.vocab_size)), tokenizer=tokenizer
    )
    for known in (lens, lens.tokenizer):
        assert torch.equal(
            utils.tokenize_and_concatenate(texts, known, max_length=5)["tokens"], rows["tokens"]
        )
    for call, says in (
        (lambda: utils.get_dataset("pile"), "NeelNanda/pile-10k"),
        (lambda: utils.get_dataset(str(tmp_path / "none")), "none"),
        (lambda: utils.keep_single_column(lines, "texts"), "no column 'texts'"),
        (lambda: utils.tokenize_and_concatenate(texts, tokenizer, max_length=90), "too few"),
    ):
        with pytest.raises(RequestError, match=says):
            call()


def test_logits_as_a_table() -> None:
    pytest.importorskip("pandas")
    logits = torch.tensor([0.0, 2.0, 1.0])
    table = utils.logits_to_df(logits, top_k=2)
    assert table["token_index"].tolist() == [1, 2] and table["logit"].tolist() == [2.0, 1.0]
    assert table["probability"].tolist() == pytest.approx(logits.softmax(-1)[[1, 2]].tolist())
    assert table["log_prob"].apply(math.exp).tolist() == pytest.approx(table["probability"].tolist())
    tokenizer = bytes_tokenizer()
    assert utils.logits_to_df(torch.arange(99.0), tokenizer)["token_string"][0] == "b"
    with pytest.raises(RequestError, match="one position"):
        utils.logits_to_df(torch.zeros(2, 3))


class Padding:
    bos_token_id, pad_token_id, padding_side, bos_token = 1, 0, "left", "<s>"


def test_special_tokens() -> None:
    left = torch.tensor([[0, 0, 1, 5], [0, 1, 5, 6]])
    assert utils.get_tokens_with_bos_removed(Padding(), left).tolist() == [[0, 0, 5], [0, 5, 6]]
    assert utils.get_tokens_with_bos_removed(Padding(), left[:, 2:], "right").tolist() == [[5], [6]]
    shared = Padding()
    shared.pad_token_id = 1
    ids = torch.tensor([[1, 1, 1, 5], [1, 5, 6, 7]])
    assert utils.get_tokens_with_bos_removed(shared, ids).tolist() == [[1, 1, 5], [5, 6, 7]]
    assert utils.get_input_with_manually_prepended_bos("<s>", ["a", "b"]) == ["<s>a", "<s>b"]
    assert utils.get_input_with_manually_prepended_bos(Padding(), "a") == "<s>a"
    assert utils.get_input_with_manually_prepended_bos(None, "a") == "a"
    assert utils.get_tokenizer_with_bos(shared) is shared


def test_objects_and_parameters() -> None:
    lens = HookedTransformer.from_engine(strong_model(tiny_config()))
    assert utils.get_nested_attr(lens, "blocks.1.attn") is lens.blocks[1].attn
    utils.set_nested_attr(lens, "blocks.1.attn.mark", 3)
    assert lens.blocks[1].attn.mark == 3
    parts = utils.filter_dict_by_prefix(lens.state_dict(), "blocks.1.mlp")
    assert sorted(parts) == ["W_in", "W_out", "b_in", "b_out"]
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(KeyError), utils.temporarily_swap_parameter(parameter, torch.zeros(3)) as swapped:
        assert swapped is parameter and not swapped.any()
        raise KeyError
    assert bool((parameter == 1).all())
    with (
        pytest.raises(RequestError, match=r"\[4\]"),
        utils.temporarily_swap_parameter(parameter, torch.zeros(4)),
    ):
        pass
    assert utils.is_library_available("torch") and not utils.is_library_available("no_such_package")
    assert (
        utils.override_or_use_default_value(1, None) == 1 and utils.override_or_use_default_value(1, 0) == 0
    )
    ordered = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    utils.check_structure(ordered, ordered * 5)
    with pytest.raises(RequestError, match="between rows 0 and 1"):
        utils.check_structure(ordered, ordered.flip(0))


REFUSED = """
from neuron_lens.compat import install_as_transformer_lens
install_as_transformer_lens()
import transformer_lens, transformer_lens.utilities.tensors
from transformer_lens.components.mlps.can_be_used_as_mlp import CanBeUsedAsMLP
from transformer_lens.components import GatedMLP, LayerNorm, LayerNormPre, TransformerBlock
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.HookedTransformer import HookedRootModule, HookPoint, Loss, Output
from transformer_lens.utilities import get_act_name, lm_accuracy
assert CanBeUsedAsMLP is GatedMLP and LayerNorm is LayerNormPre
for line, says in (
    ("from transformer_lens.model_bridge import TransformerBridge", "use HookedTransformer"),
    ("from transformer_lens import tools", "neuron_lens.analysis"),
    ("import transformer_lens.tools.model_registry", "neuron_lens.analysis"),
    ("from transformer_lens.utils import clear_huggingface_cache", "hf cache"),
    ("from transformer_lens.evals import ioi_eval", "evaluate_on_dataset"),
    ("import transformer_lens.nothing", "head_detector"),
    ("TransformerBlock(1)", "made by the model"),
):
    try:
        exec(line)
    except (ImportError, ValueError) as error:
        assert says in str(error), (line, str(error))
    else:
        raise SystemExit(line + " is not refused")
"""


def test_what_is_not_offered_says_what_to_use() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
