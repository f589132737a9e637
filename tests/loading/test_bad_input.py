"""Each wrong checkpoint is one clear error that names what is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_lens.errors import CheckpointError, RequestError
from neuron_lens.loading import load

from .families import CASES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES[0].save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def message(given: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(given, **options)
    return str(caught.value)


def test_missing_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: [tensors.pop(f"transformer.h.{i}.ln_1.bias") for i in (0, 1)])
    text = message(folder)
    assert "blocks.0.ln_attn.bias" in text and "blocks.1.ln_attn.bias" in text


def test_unknown_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"a.b": torch.ones(1), "c.d": torch.ones(1)}))
    text = message(folder)
    assert "a.b, c.d" in text and "gpt2.toml" in text


def test_tensors_beyond_the_config_are_named(folder: Path) -> None:
    edit_config(folder, n_layer=1)
    text = message(folder)
    assert "transformer.h.1.attn.c_attn.bias (which gpt2.toml:" in text


@pytest.mark.parametrize(
    ("changed", "tensor"),
    [({"n_positions": 32}, "wpe"), ({"vocab_size": 60}, "wte"), ({"n_inner": 40}, "c_fc")],
)
def test_a_shape_that_contradicts_the_config(folder: Path, changed: dict[str, int], tensor: str) -> None:
    edit_config(folder, **changed)
    text = message(folder)
    assert "contradict config.json" in text and tensor in text


def test_a_tensor_that_does_not_split(folder: Path) -> None:
    edit_tensors(
        folder, lambda tensors: tensors.update({"transformer.h.0.attn.c_attn.bias": torch.ones(100)})
    )
    assert "100 rows do not split into 3" in message(folder)


def test_two_names_of_one_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"ln_f.bias": torch.ones(48)}))
    text = message(folder)
    assert "ln_f.bias and transformer.ln_f.bias" in text or "transformer.ln_f.bias and ln_f.bias" in text


def test_tied_ends_that_differ(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(61, 48)}))
    assert "tie_word_embeddings" in message(folder)


def test_a_missing_expert(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family == "mixtral")
    folder = case.save(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert "blocks.1.mlp.gate lacks parts" in message(folder)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in message(folder)


def test_weights_of_another_format(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"GGUF" + bytes(1000))
    assert "model.safetensors" in message(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights" in message(folder)


class Bomb:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of the pickle ran')",))


def test_a_pickle_with_code_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb()}, protocol=2))
    assert "is refused" in message(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "holds no config.json" in message(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in message(folder)


def test_unknown_architecture_says_where_to_add_it(folder: Path) -> None:
    edit_config(folder, architectures=["GPT2LMHeadModell"])
    text = message(folder)
    assert "GPT2LMHeadModell" in text and "did you mean 'GPT2LMHeadModel'" in text and "model_defs" in text


@pytest.mark.parametrize("architectures", [None, [], "GPT2LMHeadModel"])
def test_no_architecture(folder: Path, architectures: Any) -> None:
    edit_config(folder, architectures=architectures)
    assert "names no architecture" in message(folder)


def test_quantised_weights(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    assert "quantised" in message(folder) and "mxfp4" in message(folder)


def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_network)
    assert "local folder" in message("somebody/some-model")
    assert "no checkpoint folder" in message(Path("nowhere"))


def _no_network(*args: Any, **kwargs: Any) -> Any:
    raise ConnectionError("no route to host")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    assert "give the folder" in message(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float33", "int64", torch.int8])
def test_no_floating_point_dtype(folder: Path, dtype: Any) -> None:
    with pytest.raises(RequestError, match="dtype"):
        load(folder, dtype=dtype)


def test_an_object_that_is_no_model() -> None:
    with pytest.raises(RequestError, match="cannot load int"):
        load(3)


def test_tokens_beyond_the_vocabulary_and_an_empty_prompt(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(RequestError, match="61 is outside the vocabulary of 61"):
        model(torch.tensor([[3, 61]]))
    with pytest.raises(RequestError, match="empty"):
        model(torch.zeros(1, 0, dtype=torch.long))
