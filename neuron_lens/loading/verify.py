"""Hold a loaded checkpoint to Hugging Face's implementation of it, number by number (extra `hf`).

Both read the same folder, each with its own code, in float32 on the CPU. Differences are measured against the scale of Hugging
Face's own numbers, so that they mean the same at every size.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_lens.errors import MissingExtraError, RequestError
from neuron_lens.files.hub import resolve_checkpoint
from neuron_lens.hooks import TransformerHooks
from neuron_lens.loading.load import load
from neuron_lens.transformer import KVCache, Transformer

__all__ = ["Verification", "verify"]

_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far a loaded model is from Hugging Face's.

    Attributes:
        logits, hidden: largest difference over the standard deviation of theirs; hidden is the worst of all layers (of the
            last one behind the final norm, as transformers gives it).
        gradient: norm of the difference over the norm of theirs, for the next-token loss with respect to the embedding
            matrix; most of its rows are nearly zero, so that a standard deviation would say little.
        hidden_at: where the worst hidden state is: a layer's output, "embedding" or "final norm".
        left_padded, right_padded: largest difference between a row in a padded batch and the row alone, in ours.
        generated, equal_tokens: greedy tokens generated (with key-value caches), and how many agree before the first that
            does not.
        tolerance: what the differences must stay below.
    """

    name: str
    logits: float
    hidden: float
    hidden_at: str
    gradient: float
    left_padded: float
    right_padded: float
    generated: int
    equal_tokens: int
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest of all differences; not a number when any is not."""
        differences = (self.logits, self.hidden, self.gradient, self.left_padded, self.right_padded)
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    @property
    def passed(self) -> bool:
        """Every difference is below the tolerance, and all greedy tokens agree."""
        return self.worst < self.tolerance and self.equal_tokens == self.generated

    def __str__(self) -> str:
        return (
            f"{self.name}: {'equal' if self.passed else 'DIFFERENT'} (tolerance {self.tolerance:g})\n"
            f"  logits          {self.logits:.1e}\n"
            f"  hidden states   {self.hidden:.1e} (worst: {self.hidden_at})\n"
            f"  gradient        {self.gradient:.1e}\n"
            f"  padded rows     {self.left_padded:.1e} left, {self.right_padded:.1e} right\n"
            f"  greedy tokens   {self.equal_tokens} of {self.generated} equal"
        )


def verify(
    name_or_path: str | os.PathLike[str],
    *,
    length: int = 24,
    new_tokens: int = 8,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> Verification:
    """Compare a checkpoint as loaded here with the same as loaded by `transformers`.

    The prompts are random token ids: rows of `length`, two thirds and a third of it.

    Raises MissingExtraError without transformers, CheckpointError for a checkpoint that cannot be loaded, RequestError
    for a prompt that is too long or too short.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "verifying a checkpoint") from error
    folder = resolve_checkpoint(name_or_path)
    ours = load(folder, dtype=torch.float32, tokenizer=None)
    if length < _ROWS or length + new_tokens > ours.config.n_ctx:
        raise RequestError(
            f"length {length} with {new_tokens} new tokens does not fit: expected at least {_ROWS}, and together at most "
            f"the context of {ours.config.n_ctx}"
        )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    rows = _random_rows(theirs, length, seed)
    logits, hidden, hidden_at = _compare_forward(ours, theirs, rows)
    generated, equal_tokens = _compare_greedy(ours, theirs, rows[0], new_tokens)
    return Verification(
        name=os.fspath(name_or_path),
        logits=logits,
        hidden=hidden,
        hidden_at=hidden_at,
        gradient=_compare_gradient(ours, theirs, rows[0]),
        left_padded=_padded_difference(ours, rows, left=True),
        right_padded=_padded_difference(ours, rows, left=False),
        generated=generated,
        equal_tokens=equal_tokens,
        tolerance=tolerance,
    )


def _random_rows(theirs: Any, length: int, seed: int) -> list[Tensor]:
    """Prompts [1, pos] of several lengths, without the padding token, whose gradient torch leaves out."""
    embedding = theirs.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(embedding.num_embeddings, (1, max(1, length * part // _ROWS)), generator=generator)
        for part in range(_ROWS, 0, -1)
    ]
    padding = embedding.padding_idx
    return (
        rows
        if padding is None
        else [row.where(row != padding, (padding + 1) % embedding.num_embeddings) for row in rows]
    )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.std())


@torch.no_grad()
def _compare_forward(ours: Transformer, theirs: Any, rows: list[Tensor]) -> tuple[float, float, str]:
    """Worst difference of logits and of hidden states over rows alone, and where the latter is."""
    logits, worst, where = 0.0, 0.0, "embedding"
    last = ours.config.n_layers - 1
    for row in rows:
        hooks = TransformerHooks()
        recording = hooks.record(["resid.post_emb", "resid.torso.post_mlp", "resid.post_ln_f"])
        our_logits = ours(row, hooks=hooks)
        expected = theirs(row, output_hidden_states=True)
        logits = max(logits, _difference(our_logits, expected.logits))
        states = {"embedding": recording["resid.post_emb"]}
        states |= {f"layer {layer}": recording["resid.torso.post_mlp", layer] for layer in range(last)}
        states["final norm"] = recording["resid.post_ln_f"]  # theirs gives the last layer's output behind it
        for (place, state), reference in zip(states.items(), expected.hidden_states, strict=True):
            difference = _difference(state, reference)
            if difference > worst:
                worst, where = difference, place
    return logits, worst, where


def _compare_gradient(ours: Transformer, theirs: Any, row: Tensor) -> float:
    gradients = []
    for model, embedding in ((ours, ours.embed), (theirs, theirs.get_input_embeddings())):
        output = model(row)
        logits = output if isinstance(output, Tensor) else output.logits
        loss = F.cross_entropy(logits[0, :-1], row[0, 1:])
        gradients.append(torch.autograd.grad(loss, embedding.weight)[0])
    given, expected = gradients
    return float((given - expected).norm() / expected.norm())


@torch.no_grad()
def _padded_difference(ours: Transformer, rows: list[Tensor], *, left: bool) -> float:
    """Rows of unlike length in one batch against each alone."""
    longest = max(row.shape[1] for row in rows)
    tokens, pad = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.ones(len(rows), longest, dtype=torch.bool),
    )
    places = [slice(longest - row.shape[1], None) if left else slice(row.shape[1]) for row in rows]
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        tokens[index, place], pad[index, place] = row[0], False
    together = ours(tokens, pad=pad)
    return max(
        _difference(together[index, place], ours(row)[0])
        for index, (row, place) in enumerate(zip(rows, places, strict=True))
    )


@torch.no_grad()
def _compare_greedy(ours: Transformer, theirs: Any, row: Tensor, new_tokens: int) -> tuple[int, int]:
    """Greedy tokens generated, and how many agree before the first that does not."""
    from transformers import GenerationConfig

    theirs.generation_config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    expected = theirs.generate(row, attention_mask=torch.ones_like(row))[0, row.shape[1] :]
    cache = KVCache(ours.config, 1, row.shape[1] + new_tokens)
    given, tokens = row, []
    for _ in range(new_tokens):
        given = ours(given, kv_cache=cache, logits_at=-1)[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(given))
    agree = [one == other for one, other in zip(tokens, expected.tolist(), strict=True)]
    return new_tokens, next((i for i, same in enumerate(agree) if not same), new_tokens)
