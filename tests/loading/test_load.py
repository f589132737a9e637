"""Loading: the same model from every form of a checkpoint, nothing copied without need, nothing of theirs changed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuron_lens.files.model_defs import shipped_checkpoints
from neuron_lens.loading import load
from neuron_lens.transformer import Transformer

from .families import CASES, Case, quiet

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def case(family: str) -> Case:
    return next(case for case in CASES if case.family == family)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case("gpt2").save(tmp_path_factory.mktemp("gpt2"))


def test_pickled_and_mapped_weights_are_one_model(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert torch.equal(load(tmp_path)(TOKENS), load(folder)(TOKENS))


def test_parameters_view_the_mapped_file(folder: Path) -> None:
    model = load(folder)
    weights = [
        model.embed.weight,
        *(getattr(model.blocks[0].attn, name).weight for name in "qkv"),
        model.blocks[1].mlp.up.weight,
    ]
    places = [weight.data_ptr() for weight in weights]
    size = (folder / "model.safetensors").stat().st_size
    assert max(places) - min(places) < size
    assert weights[1].untyped_storage().data_ptr() == weights[3].untyped_storage().data_ptr()


def test_training_a_loaded_model_leaves_the_file(folder: Path) -> None:
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() == before
    assert not torch.equal(load(folder)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_neox", "gpt_oss", "stablelm"])
def test_a_model_object_gives_what_its_folder_gives(family: str, tmp_path: Path) -> None:
    shape = case(family)
    with quiet():
        theirs = shape.model()
        theirs.save_pretrained(tmp_path)
    assert torch.equal(load(theirs)(TOKENS), load(tmp_path)(TOKENS))


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_a_model_object_and_ours_share_nothing(family: str) -> None:
    theirs = case(family).model()
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = load(theirs)
    expected = ours(TOKENS)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1.0)
    assert torch.equal(ours(TOKENS), expected)
    theirs.load_state_dict(state)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float16, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float16, "float16", torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_dtype(
    stored: torch.dtype, asked: torch.dtype | str | None, expected: torch.dtype, tmp_path: Path
) -> None:
    case("llama").model().to(stored).save_pretrained(tmp_path)
    model = load(tmp_path, dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model(TOKENS).dtype == expected and bool(model(TOKENS).isfinite().all())


def test_the_name_is_the_last_part_of_what_was_given(folder: Path) -> None:
    assert load(folder).config.name == folder.name
    assert load(folder).tokenizer is None


@pytest.mark.skipif("pico" not in shipped_checkpoints(), reason="this checkout has no trained pico")
def test_pico_opens_by_its_name() -> None:
    model = Transformer.load("pico")
    text = "Once upon a time"
    assert model.config.name == "pico"
    assert model.tokenizer.decode(model.tokenizer.encode(text)).endswith(text)


PEAK = """
import resource, sys, torch
from neuron_lens.loading import load
from neuron_lens.transformer import Transformer
tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
load(sys.argv[1])(tokens)  # whatever torch sets up at its first forward
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load(sys.argv[2], dtype=sys.argv[3])
with torch.no_grad():
    model(tokens)
    for parameter in model.parameters():
        parameter.sum()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print((after - before) * 1024 / weights)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stored", "asked"),
    [
        ("llama", torch.float32, "float32"),
        ("llama", torch.float16, "float32"),
        ("gpt_neox", torch.float32, "float32"),
    ],
)
def test_peak_memory_is_that_of_the_weights(
    family: str, stored: torch.dtype, asked: str, folder: Path, tmp_path: Path
) -> None:
    small = case(family)
    large = Case(
        **{
            **vars(small),
            "settings": small.settings
            | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8},
        }
    )
    large.model().to(stored).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tmp_path), asked],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 1.1
