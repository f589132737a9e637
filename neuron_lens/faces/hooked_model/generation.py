"""Generation with requests at work in every step, and extraction from the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.arguments import known_arguments, refuse_unknown
from neuron_lens.faces.hooked_model.extraction_config import ExtractionConfig
from neuron_lens.faces.hooked_model.inputs import padded
from neuron_lens.faces.hooked_model.requests import Batch
from neuron_lens.transformer.sampling import stream

if TYPE_CHECKING:
    from neuron_lens.faces.hooked_model.model import HookedModel

__all__ = ["generate"]

LAST = ("last",)


def generate(
    model: HookedModel,
    given: Batch,
    generation_config: Mapping[str, Any] | None,
    target_token_positions: Sequence[Any] | None,
    return_text: bool,
    extraction_config: ExtractionConfig | None,
    **requests: Any,
) -> Any:
    """What `HookedModel.generate` says; requests: interventions and queries, as `forward` takes them."""
    options = {} if generation_config is None else generation_config
    if not isinstance(options, Mapping):
        raise RequestError(f"generation_config must be a dict of options; got {options!r:.60}")
    if "hooks" in options:
        raise RequestError(
            "hooks are given by interventions and register_forward_hook, not in generation_config"
        )
    refuse_unknown("generation_config", options, set(known_arguments(stream)) - {"model", "prompts"})
    if target_token_positions is None and extraction_config is not None:
        raise RequestError(
            "extraction_config says what to extract: give target_token_positions, which say where"
        )
    config = ExtractionConfig(save_logits=False) if target_token_positions is None else extraction_config
    rows, batch = _left_padded(given)
    prepared = model._prepared(
        batch, LAST if target_token_positions is None else target_token_positions, config, **requests
    )
    if prepared.config.keep_gradient:
        raise RequestError("generation computes no gradients: use forward with keep_gradient=True")
    # logits of the prompt are made at its end only while generating, so they take a pass of their own
    cache = prepared.run() if prepared.config.save_logits else None
    generated = model.model.sample(rows, hooks=prepared.tree, **options)
    assert isinstance(generated, list), "a list of prompts gives a list"
    recorded = prepared.collected(None)
    output: list[Any] = [one.text for one in generated] if return_text else generated
    if target_token_positions is None:
        return output
    return {"generation_output": output, "cache": recorded if cache is None else cache}


def _left_padded(given: Batch) -> tuple[list[list[int]], Batch]:
    """The prompts without padding, and as generation lays them out."""
    rows = [
        row.tolist() if given.pad is None else row[~given.pad[i]].tolist()
        for i, row in enumerate(given.tokens)
    ]
    tokens, pad = padded(rows, "left")
    device = given.tokens.device
    return rows, replace(given, tokens=tokens.to(device), pad=None if pad is None else pad.to(device))
