"""Runs as records: what was run, on which weights, and whether it gives the same again."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, SerializeAsAny, ValidationError
from torch import Tensor

import neuron_lens
from neuron_lens.errors import RequestError
from neuron_lens.files.atomic import write_json_atomic
from neuron_lens.interventions.apply import to_hooks
from neuron_lens.interventions.declared import Intervention
from neuron_lens.interventions.places import Frozen, validation_text
from neuron_lens.interventions.store import (
    load_tensors,
    parse_interventions,
    read_json,
    save_tensors,
    tensors_of,
)
from neuron_lens.interventions.tensors import TensorData, tensor_digest

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["RecordedRun", "Replay", "record", "replay", "weights_hash"]

FORMAT = 1


def weights_hash(model: Transformer) -> str:
    """SHA-256 over the names and contents of a model's weights, and its configuration without the name."""
    digest = hashlib.sha256(model.config.model_dump_json(exclude={"name"}).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor_digest(tensor)}".encode())
    return digest.hexdigest()


class RecordedRun(Frozen):
    """One run, with everything needed to tell whether it reproduces.

    weights: hash of the model's weights. tokens, pad: what was read, [batch, pos]. interventions: what was done.
    dtype: of the weights. seed: torch's seed for the run. versions: of the library, torch and Python.
    logits: what came out [batch, columns, d_vocab]. columns: "all" or "last".
    """

    weights: str
    tokens: tuple[tuple[int, ...], ...]
    pad: tuple[tuple[bool, ...], ...] | None = None
    interventions: tuple[SerializeAsAny[Intervention], ...] = ()
    dtype: str
    seed: int
    columns: str = "last"
    versions: dict[str, str] = Field(default_factory=dict)
    logits: TensorData

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, tensors in a safetensors file beside it."""
        save_tensors(path, tensors_of(self.interventions) | {self.logits.digest: self.logits})
        write_json_atomic(path, {"format": FORMAT, **self.model_dump(mode="json")})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RecordedRun:
        """Read what `save` wrote. Raises RequestError when it is missing, damaged or something else."""
        stored = read_json(path)
        if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT or "weights" not in stored:
            raise RequestError(f"{path} does not hold a recorded run of format {FORMAT}")
        tensors = load_tensors(path)
        digest = (stored.get("logits") or {}).get("tensor")
        if digest not in tensors:
            raise RequestError(f"{path}: the logits of the run are not in the safetensors file beside it")
        try:
            listed = parse_interventions(stored.get("interventions", []), tensors, str(path))
            return cls(**{**stored, "logits": tensors[digest], "interventions": tuple(listed)})
        except ValidationError as error:
            raise RequestError(f"{path}: {validation_text(error)}") from None


@dataclass(frozen=True)
class Replay:
    """What a second run gave.

    reproduces: the logits agree within the tolerance. identical: bit for bit. difference: largest absolute difference of
    two logits. changed: what is not as it was (weights, dtype, versions), each as "what: then -> now".
    """

    reproduces: bool
    identical: bool
    difference: float
    changed: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.reproduces


def record(
    model: Transformer,
    tokens: Tensor,
    interventions: Intervention | Iterable[Intervention] = (),
    *,
    pad: Tensor | None = None,
    seed: int = 0,
    columns: str = "last",
    autoencoders: Mapping[str, Any] | None = None,
) -> RecordedRun:
    """Run the model with interventions and keep what was done and what came out.

    Args:
        tokens: [batch, pos]. pad: true where a column is padding. seed: set before the run, and put back after.
        columns: keep the logits of the "last" column or of "all".

    Raises:
        RequestError: an intervention does not fit, or `columns` is something else.
    """
    if columns not in ("last", "all"):
        raise RequestError(f"columns must be 'last' or 'all', got {columns!r}")
    listed = (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)
    logits = _run(model, tokens, listed, pad, seed, columns, autoencoders)
    return RecordedRun(
        weights=weights_hash(model),
        tokens=tuple(map(tuple, tokens.tolist())),
        pad=None if pad is None else tuple(map(tuple, pad.tolist())),
        interventions=listed,
        dtype=_dtype(model),
        seed=seed,
        columns=columns,
        versions=_versions(),
        logits=TensorData(logits),
    )


def replay(
    run: RecordedRun,
    model: Transformer,
    *,
    tolerance: float = 1e-4,
    autoencoders: Mapping[str, Any] | None = None,
) -> Replay:
    """Run again and say whether the logits are the same, up to an absolute `tolerance`."""
    pad = None if run.pad is None else torch.tensor(run.pad)
    logits = _run(
        model, torch.tensor(run.tokens), run.interventions, pad, run.seed, run.columns, autoencoders
    )
    before = run.logits.tensor.to(logits.device, logits.dtype)
    if before.shape != logits.shape:
        raise RequestError(
            f"the recorded logits are {list(before.shape)}, this model gives {list(logits.shape)}: another model"
        )
    same = torch.equal(before, logits)
    difference = (
        0.0 if same else float((before - logits).nan_to_num(torch.inf, torch.inf, torch.inf).abs().max())
    )
    now = {"weights": weights_hash(model), "dtype": _dtype(model), **_versions()}
    then = {"weights": run.weights, "dtype": run.dtype, **run.versions}
    changed = tuple(
        f"{what}: {then.get(what)} -> {value}" for what, value in now.items() if then.get(what) != value
    )
    return Replay(difference <= tolerance, same, difference, changed)


def _run(
    model: Transformer,
    tokens: Tensor,
    interventions: Iterable[Intervention],
    pad: Tensor | None,
    seed: int,
    columns: str,
    autoencoders: Mapping[str, Any] | None,
) -> Tensor:
    hooks = to_hooks(interventions, model, tokens=tokens, pad=pad, autoencoders=autoencoders)
    last: Tensor | None = None
    if columns == "last":
        last = last_columns(tokens, pad)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        logits: Tensor = model(tokens, hooks=hooks, pad=pad, logits_at=last)
    return logits


def last_columns(tokens: Tensor, pad: Tensor | None) -> Tensor:
    """The column of each row's last real token, [batch]."""
    if pad is None:
        return torch.full((tokens.shape[0],), tokens.shape[1] - 1, device=tokens.device)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(pad, -1, columns).amax(-1)


def _dtype(model: Transformer) -> str:
    return str(model.embed.weight.dtype).removeprefix("torch.")


def _versions() -> dict[str, str]:
    return {
        "neuron_lens": neuron_lens.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
