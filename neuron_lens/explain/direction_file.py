"""Directions of a model that somebody has in a file: probes, steering vectors, differences of means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from neuron_lens.errors import CheckpointError, RequestError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_lens.harvest.sources import Direction

__all__ = ["DEFAULT_SITE", "directions_of_file", "read_vectors"]

DEFAULT_SITE = "resid.torso.post_mlp"  # the stream after the block

_PICKLES = (".pt", ".pth")
_EXPECTED = "expected one vector [width] or several [n, width]"
_NEURON_SITES = ("mlp.pre_act", "mlp.post_act")  # besides all that are as wide as the stream


def directions_of_file(path: str | Path, layer: int, site: str = DEFAULT_SITE) -> list[Direction]:
    """The directions in a file at a site of a layer, in order; see `read_vectors`.

    They are named by the file, the site where it is not the default, and, of several, their row from 0.

    Raises RequestError as `read_vectors` does, and for a site that is not as wide as the stream or the MLP.
    """
    from neuron_lens.harvest.sources import Direction

    _require_site(site)
    vectors = read_vectors(path)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).stem).lstrip(".")[:64] or "direction"
    name += "" if site == DEFAULT_SITE else f"-{site.rpartition('.')[2]}"
    if vectors.ndim == 1:
        return [Direction(name, vectors, site, layer)]
    return [Direction(f"{name}-{row}", vector, site, layer) for row, vector in enumerate(vectors)]


def read_vectors(path: str | Path) -> Tensor:
    """The one tensor of a .npy, .safetensors or .pt file, `[width]` or `[n, width]`, in float32. No code in it runs.

    Raises RequestError for a file of another kind, that is damaged, holds several tensors, another shape, no real
    numbers, or a vector that is zero or not finite.
    """
    path = Path(path)
    tensor = _tensor(path)
    if tensor.is_complex() or str(tensor.dtype) == "torch.bool":
        raise RequestError(
            f"{path} holds {str(tensor.dtype).removeprefix('torch.')} values; {_EXPECTED} of real numbers"
        )
    if tensor.ndim not in (1, 2) or not tensor.numel():
        raise RequestError(f"{path} holds a tensor of shape {list(tensor.shape)}; {_EXPECTED}")
    vectors = tensor.detach().float()
    rows = vectors.reshape(-1, vectors.shape[-1])
    for reason, bad in (
        ("holds values that are not finite", ~rows.isfinite().all(-1)),
        ("is zero and has no direction", rows.norm(dim=-1) == 0),
    ):
        if bool(bad.any()):
            first = f"row {int(bad.nonzero()[0])} of {path}" if vectors.ndim == 2 else f"the vector in {path}"
            raise RequestError(f"{first} {reason}; leave it out or write it anew")
    return vectors


def _tensor(path: Path) -> Tensor:
    import numpy as np
    import torch

    if not path.is_file():
        raise RequestError(f"there is no file {path}; {_EXPECTED} in a .npy, .safetensors or .pt file")
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:  # numpy leaves it open where it is no array
                return torch.from_numpy(np.load(file, allow_pickle=False))
        if path.suffix == ".safetensors":
            from neuron_lens.files.safetensors import SafetensorsSource

            found = SafetensorsSource(path.parent, [path])
            return _only({name: found.read(name) for name in found.names()}, path)
        if path.suffix in _PICKLES:
            from neuron_lens.files.pickles import unpickled

            return _only(unpickled(path), path)
    except CheckpointError as error:
        raise RequestError(str(error)) from None
    except RequestError:
        raise
    except (OSError, EOFError, ValueError, TypeError) as error:
        problem = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
        raise RequestError(f"{path} is no whole .npy array of numbers{problem}; {_EXPECTED}") from None
    raise RequestError(
        f"{path} is of no kind that directions are read from: give a .npy, .safetensors or .pt file"
    )


def _only(held: object, path: Path) -> Tensor:
    """The tensor, or the one tensor under a name."""
    import torch

    if isinstance(held, dict) and len(held) == 1:
        (held,) = held.values()
    if isinstance(held, torch.Tensor):
        return held
    if isinstance(held, dict):
        names = ", ".join(repr(str(name)) for name in list(held)[:8]) or "nothing"
        raise RequestError(f"{path} holds {len(held)} entries ({names}); {_EXPECTED} as its one tensor")
    raise RequestError(f"{path} holds a {type(held).__name__}; {_EXPECTED}")


def _require_site(site: str) -> None:
    from neuron_lens.hooks import TransformerHooks

    fitting = [
        each.path
        for each in TransformerHooks().sites()
        if each.per_layer and (each.axes == ("batch", "pos", "d_model") or each.path in _NEURON_SITES)
    ]
    if site not in fitting:
        raise RequestError(
            f"directions lie at sites inside the blocks that hold one vector at every position, not at {site!r}; "
            f"{did_you_mean(site, fitting)}"
        )
