"""Load an autoencoder from whatever published format its files are in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lens.autoencoders.autoencoder import Autoencoder
from neuron_lens.autoencoders.clt import CrossLayerTranscoder
from neuron_lens.autoencoders.config import AutoencoderConfig, CrossLayerTranscoderConfig, Provenance
from neuron_lens.autoencoders.folding import Weights
from neuron_lens.autoencoders.formats import FORMATS, Checkpoint, Format, Loaded, LoadOptions
from neuron_lens.autoencoders.formats.circuit_tracer import LAYER_FILE
from neuron_lens.autoencoders.self_check import check_autoencoder, check_cross_layer
from neuron_lens.errors import CheckpointError, RequestError, did_you_mean

__all__ = ["load_autoencoder", "load_autoencoders", "load_cross_layer_transcoder"]


def load_autoencoder(
    path: str | Path,
    format: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    scaling_factor: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    activations: Tensor | None = None,
    target: Tensor | None = None,
    min_explained_variance: float = 0.0,
) -> Autoencoder:
    """Load one autoencoder or transcoder, check it, and record where it came from.

    Args:
        path: a folder or a file.
        format: a name in `FORMATS`; recognised from the files when not given.
        device: where the weights go.
        dtype: of the weights, and so of the computation; as stored when not given.
        scaling_factor: SAELens "expected_average_only_in" only: what training multiplied activations with,
            where no file tells it (1.0: already folded in).
        overrides: config fields that the files do not tell or tell wrongly, {"flatten_heads": True}.
        activations: [..., d_in] of its own site, to check that the reconstruction explains their variance.
        target: [..., d_out], what a transcoder should predict from them.
        min_explained_variance: the least share that counts as loaded right.

    Raises:
        CheckpointError: no known format, missing or surplus tensors, shapes that contradict the config, NaNs,
            a truncated file, or a failed check.
        ConfigError: overrides that contradict the rest.
        RequestError: an unknown `format`.
    """
    checkpoint = Checkpoint(path)
    reader = _format_of(checkpoint, format)
    loaded = reader.load(checkpoint, LoadOptions(scaling_factor=scaling_factor))
    config = loaded.config
    if isinstance(config, CrossLayerTranscoderConfig):
        raise CheckpointError(
            f"{path} is a cross-layer transcoder of {config.n_layers} layers: use load_cross_layer_transcoder"
        )
    fields = {**dict(config), "provenance": _provenance(checkpoint, reader, loaded), **(overrides or {})}
    autoencoder = Autoencoder(AutoencoderConfig(**fields), device="meta")
    _fill(autoencoder, loaded.weights, dtype or loaded.weights["W_dec"].dtype, device, checkpoint)
    autoencoder.self_check = check_autoencoder(
        autoencoder, activations, target, min_explained_variance=min_explained_variance
    )
    return autoencoder


def load_autoencoders(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> dict[int, Autoencoder]:
    """All transcoders of a circuit-tracer set, layer -> transcoder. See `load_autoencoder`."""
    checkpoint = Checkpoint(folder)
    files = checkpoint.matching(LAYER_FILE)
    if not files:
        raise CheckpointError(f"{folder} holds no layer_N.safetensors; it holds {_listing(checkpoint)}")
    return {
        layer: load_autoencoder(checkpoint.folder / name, "circuit_tracer", device=device, dtype=dtype)
        for layer, name in files.items()
    }


def load_cross_layer_transcoder(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    activations: Tensor | None = None,
    target: Tensor | None = None,
    min_explained_variance: float = 0.0,
) -> CrossLayerTranscoder:
    """Load a cross-layer transcoder (circuit-tracer's or Gemma Scope 2's files), check it, and record where it came from.

    Args:
        activations: [layer, ..., d_in] of the sites it reads, with target [layer, ..., d_out], what it should predict:
            to check that it explains each layer's variance, min_explained_variance of it at least.

    Raises CheckpointError as `load_autoencoder` does.
    """
    checkpoint = Checkpoint(folder)
    reader = _format_of(checkpoint, "cross_layer")
    loaded = reader.load(checkpoint, LoadOptions())
    assert isinstance(loaded.config, CrossLayerTranscoderConfig), "its loader makes no other kind"
    config = loaded.config.model_copy(update={"provenance": _provenance(checkpoint, reader, loaded)})
    transcoder = CrossLayerTranscoder(config, device="meta")
    _fill(transcoder, loaded.weights, dtype or loaded.weights["W_dec.0"].dtype, device, checkpoint)
    transcoder.self_check = check_cross_layer(
        transcoder, activations, target, min_explained_variance=min_explained_variance
    )
    return transcoder


def _format_of(checkpoint: Checkpoint, name: str | None) -> Format:
    if name is not None:
        if name not in FORMATS:
            raise RequestError(f"there is no autoencoder format {name!r}: {did_you_mean(name, FORMATS)}")
        if not FORMATS[name].recognises(checkpoint):
            raise CheckpointError(
                f"{checkpoint.path} is not of the format {name!r}, which needs {FORMATS[name].EXPECTS}; "
                f"it holds {_listing(checkpoint)}"
            )
        return FORMATS[name]
    fitting = [each for each in FORMATS.values() if each.recognises(checkpoint)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"{checkpoint.path} could be of the formats {', '.join(each.NAME for each in fitting)}; "
            "say which with format=…"
        )
    known = "; ".join(f"{each.NAME}: {each.EXPECTS}" for each in FORMATS.values())
    raise CheckpointError(
        f"{checkpoint.path} is of no known autoencoder format: it holds {_listing(checkpoint)}. "
        f"Known are {known}"
    )


def _listing(checkpoint: Checkpoint) -> str:
    """The files there are, and of a single pickle or safetensors file its tensors."""
    if checkpoint.path.is_file() and checkpoint.path.suffix in (".pt", ".pth", ".safetensors", ".npz"):
        return "the tensors " + ", ".join(sorted(checkpoint.tensors(checkpoint.path.name))[:12])
    more = len(checkpoint.names) - 12
    shown = ", ".join(checkpoint.names[:12]) or "nothing"
    return f"{shown} and {more} more" if more > 0 else shown


def _provenance(checkpoint: Checkpoint, reader: Format, loaded: Loaded) -> Provenance:
    return Provenance(
        format=reader.NAME,
        path=str(checkpoint.path),
        files=tuple(checkpoint.files_read),
        source_config=loaded.source_config,
        notes=tuple(loaded.notes),
    )


def _fill(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    device: str | torch.device,
    checkpoint: Checkpoint,
) -> None:
    """Put the weights into the module (made on the meta device), after holding every shape to its config."""
    if not dtype.is_floating_point:
        raise RequestError(f"weights cannot be of dtype {dtype}; give a floating point dtype")
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert expected.keys() == weights.keys(), (
        f"loader and config disagree on names: {expected.keys() ^ weights.keys()}"
    )
    wrong = [
        f"{name} is {list(weights[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if tuple(weights[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(f"{checkpoint.path} does not match its own config: {'; '.join(wrong)}")
    # Contiguous, so that gathering decoder rows reads whole cache lines; a copy only where it is needed.
    ready = {name: tensor.to(device, dtype).contiguous() for name, tensor in weights.items()}
    module.load_state_dict(ready, assign=True)
