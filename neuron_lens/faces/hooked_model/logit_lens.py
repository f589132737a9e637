"""The logit lens, direct logit attribution and tuned lenses over an extracted cache."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from neuron_lens.analysis.lens import final_norm_of_part, stream_logits
from neuron_lens.errors import CheckpointError, RequestError
from neuron_lens.faces.hooked_model.fields import Place, named_place

if TYPE_CHECKING:
    from neuron_lens.faces.hooked_model.model import HookedModel
    from neuron_lens.transformer import Transformer

__all__ = ["LogitLens"]

Translator = tuple[
    Tensor, Tensor | None
]  # weight [d_model, d_model] and bias [d_model] of what is added to the stream
# Fields whose values are vectors of the stream, besides those of kind "stream" and "projected".
WRITES = ("extract_head_out",)
# Fields a tuned lens reads -> what is added to their layer to give the block that the stream enters.
ENTERING = {"extract_embed": 0, "extract_resid_in": 0, "extract_resid_out": 1}


class LogitLens:
    """Reads what was extracted as logits.

    Args:
        model: whose final norm and unembedding are used.
        translators: of a tuned lens (Belrose et al. 2023, arXiv 2303.08112), one for the stream entering each layer; None for the
            plain lens.
    """

    def __init__(
        self, model: HookedModel | Transformer, translators: Sequence[Translator] | None = None
    ) -> None:
        engine: Any = getattr(model, "model", model)
        self.model: Transformer = engine
        self.translators = None if translators is None else list(translators)

    @classmethod
    def from_model(cls, model: HookedModel | Transformer) -> LogitLens:
        """The plain lens of a loaded model."""
        return cls(model)

    @classmethod
    def from_model_name(cls, name: str, **options: Any) -> LogitLens:
        """The plain lens of a model by name or path; options: fields of `HookedModelConfig`."""
        from neuron_lens.faces.hooked_model.model import HookedModel

        return cls(HookedModel.from_pretrained(name, **options))

    @classmethod
    def from_tuned_lens(cls, model: HookedModel | Transformer, folder: str | os.PathLike[str]) -> LogitLens:
        """A tuned lens as the tuned-lens project saves it: a folder with `params.pt` and `config.json`.

        Raises CheckpointError when they cannot be read, or are for a model of other sizes.
        """
        engine: Any = getattr(model, "model", model)
        return cls(engine, _read_translators(Path(folder), engine))

    def get_keys(self, cache: Mapping[str, Any], target_key: str) -> list[str]:
        """The cache's keys that a key means; braces stand for any number: `resid_out_{i}`, `head_out_L{i}H{j}`.

        Raises RequestError when there are none.
        """
        if target_key in cache:
            return [target_key]
        pattern = r"\d+".join(map(re.escape, re.split(r"\{\w*\}", target_key)))
        found = [key for key in cache if re.fullmatch(pattern, key)]
        if not found:
            raise RequestError(f"the cache has no key {target_key!r}; extract it, or name one it has")
        return found

    def compute(
        self,
        cache: Mapping[str, Any],
        target_key: str,
        token_directions: Sequence[Any] | None = None,
        apply_norm: bool = True,
        apply_softmax: bool = False,
        metric: Literal["logit_diff", "accuracy"] = "logit_diff",
        *,
        statistics: Literal["own", "final"] = "own",
    ) -> dict[str, Any]:
        """Logits of extracted vectors, under `logit_lens_{key}` for each key.

        Args:
            target_key: a key, or one with braces for any number.
            token_directions: for each example a token id, whose logit is taken, or a pair of ids, whose difference is.
            apply_norm: False unembeds the vectors as they are.
            apply_softmax: probabilities in place of logits.
            metric: "accuracy": the fraction of examples whose first token's logit is above the second's.
            statistics: "own": the vector is normed by itself, the logit lens of a stream. "final": by the statistics of the
                stream entering the final norm (`extract_last_layernorm`), direct logit attribution: a part's logits, without
                the biases and the soft cap of the whole; those of all parts sum to the model's.

        Returns:
            For each key [batch, positions, d_vocab]; with directions [batch, positions]; accuracies [positions]. Lists of one
            tensor a row when rows are ragged (accuracies need equal rows).

        Raises:
            RequestError: keys that hold no vectors of the stream, statistics or directions that do not fit.
        """
        if metric not in ("logit_diff", "accuracy") or statistics not in ("own", "final"):
            raise RequestError(
                f"metric is 'logit_diff' or 'accuracy', statistics 'own' or 'final'; got {metric!r}, {statistics!r}"
            )
        if statistics == "final" and not (apply_norm and self.translators is None and not apply_softmax):
            raise RequestError(
                "statistics='final' attributes logits linearly: leave out apply_norm=False, apply_softmax and tuned lenses"
            )
        if metric == "accuracy" and token_directions is None:
            raise RequestError(
                "accuracy compares two tokens: give token_directions, a pair of ids for each example"
            )
        results: dict[str, Any] = {}
        for key in self.get_keys(cache, target_key):
            place, given = self._place(key), cache[key]
            ragged = isinstance(given, list)
            if ragged and metric == "accuracy":
                raise RequestError(f"{key}: accuracies need equal rows; extract without ragged=True")
            tokens = _directions(token_directions, len(given), self.model.config.d_vocab)
            if metric == "accuracy" and tokens is not None and tokens.shape[1] != 2:
                raise RequestError("accuracy compares two tokens: give a pair of ids for each example")
            moments = _moments(cache, key) if statistics == "final" else None
            values = []
            for rows in [slice(i, i + 1) for i in range(len(given))] if ragged else [slice(None)]:
                x = given[rows][0][None] if ragged else given
                ids = None if tokens is None else tokens[rows]
                known = (
                    {name: _rows(value, rows, ragged) for name, value in moments.items()} if moments else None
                )
                normed = self._normed(x, place, known, apply_norm)
                values.append(self._logits(normed, ids, apply_softmax, linear=known is not None))
            read: Any = [value[0] for value in values] if ragged else values[0]
            results[f"logit_lens_{key}"] = (read > 0).float().mean(0) if metric == "accuracy" else read
        return results

    def _place(self, key: str) -> Place:
        """What a key names. Raises RequestError when its values are no vectors of the stream."""
        place = named_place(key.removeprefix("avg_"))
        if place.field.kind not in ("stream", "projected") and place.name not in WRITES:
            raise RequestError(
                f"{key} holds no vectors of the stream, which alone can be unembedded; use resid_…, attn_out_…, "
                f"mlp_out_…, head_out_… or projected_…"
            )
        if self.translators is not None and place.name not in ENTERING:
            raise RequestError(
                f"{key}: a tuned lens reads the stream between layers: resid_in_…, resid_out_… or input_embeddings"
            )
        return place

    def _normed(
        self, x: Tensor, place: Place, moments: Mapping[str, Tensor] | None, apply_norm: bool
    ) -> Tensor:
        """x [batch, pos, d_model], translated by a tuned lens, behind the final norm."""
        weight = self.model.unembed.weight
        x = x.to(weight)
        if self.translators is not None:
            layer = ENTERING[place.name] + (place.layer or 0)
            if layer < len(self.translators):  # what leaves the last block needs no translation
                matrix, bias = self.translators[layer]
                x = x + torch.nn.functional.linear(x, matrix.to(x), None if bias is None else bias.to(x))
        if not apply_norm or self.model.ln_f is None:
            return x
        if moments is not None:
            return final_norm_of_part(self.model, x, moments)
        with torch.no_grad():
            normed: Tensor = self.model.ln_f(x)
        return normed

    def _logits(self, normed: Tensor, tokens: Tensor | None, apply_softmax: bool, *, linear: bool) -> Tensor:
        """Logits [batch, pos, d_vocab]; of tokens [batch, 1 or 2] their logit or difference [batch, pos]."""
        if tokens is None or apply_softmax:
            logits = stream_logits(self.model, normed, linear=linear)
            logits = logits.softmax(-1) if apply_softmax else logits
            if tokens is None:
                return logits
            ids = tokens.to(logits.device)[:, None, :].expand(-1, logits.shape[1], -1)
            logits = logits.gather(-1, ids)
        else:
            logits = stream_logits(self.model, normed, tokens, linear=linear)
        return logits[..., 0] - logits[..., 1] if tokens.shape[1] == 2 else logits[..., 0]


def _rows(value: Any, rows: slice, ragged: bool) -> Tensor:
    """Some rows of the statistics [batch, pos]."""
    chosen: Tensor = value[rows][0][None] if ragged else value[rows]
    return chosen


def _moments(cache: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The final norm's statistics at the positions of a key. Raises RequestError when the cache has none that fit."""
    if "last_layernorm" not in cache:
        raise RequestError("statistics='final' needs extract_last_layernorm=True in the extraction")
    index = cache.get("mapping_index", {})
    if key.startswith("avg_") or (isinstance(index, Mapping) and "info" in index):
        raise RequestError(
            f"{key}: a mean over positions or examples has no statistics of its own; extract without averaging, and average "
            f"the logits"
        )
    moments: Mapping[str, Any] = cache["last_layernorm"]
    return moments


def _directions(given: Sequence[Any] | None, rows: int, d_vocab: int) -> Tensor | None:
    """Token ids of each example, [batch, 1 or 2]."""
    if given is None:
        return None
    listed = given.tolist() if isinstance(given, Tensor) else list(given)
    pairs = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in listed]
    whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < d_vocab for p in pairs for i in p)
    if (
        len(pairs) != rows
        or not whole
        or len({len(pair) for pair in pairs}) != 1
        or len(pairs[0]) not in (1, 2)
    ):
        raise RequestError(
            f"token_directions are for each of {rows} examples a token id below {d_vocab}, or for each a pair; got "
            f"{given!r:.100}"
        )
    return torch.tensor(pairs)


def _read_translators(folder: Path, model: Transformer) -> list[Translator]:
    """The translators of a saved tuned lens."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = torch.load(folder / "params.pt", map_location="cpu", weights_only=True)
        sizes = (config["num_hidden_layers"], config["d_model"])
        found = [(state[f"{i}.weight"], state.get(f"{i}.bias")) for i in range(int(sizes[0]))]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(
            f"{folder} holds no tuned lens (config.json and params.pt): {type(error).__name__}: {error}"
        ) from None
    wanted = (model.config.n_layers, model.config.d_model)
    if sizes != wanted or any(weight.shape != (wanted[1], wanted[1]) for weight, _ in found):
        raise CheckpointError(
            f"{folder} is a tuned lens of {sizes[0]} layers of width {sizes[1]}; the model has {wanted[0]} of {wanted[1]}"
        )
    return found
