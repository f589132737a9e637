"""Splicing a cross-layer transcoder: the outputs of all layers at once, from latents of each layer and all before it.

    spliced = splice_cross_layer(hooks, transcoder)            # at its own sites, errors kept
    spliced.latents.append_fwd(AtLayers(0).append(AtUnits(42).append(torch.zeros_like)))
    logits = model(tokens, hooks=hooks)

Latents are read, and edited, where their layer is read; every layer's output is written from what was read in the
same pass. So an edit of a latent of layer 0 moves the output of each layer l by the change times the latent's decoder
row for l, and what the model computes from the changed stream comes on top. Knows the tree of hooks and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from neuron_lens.autoencoders.clt import CrossLayerTranscoder
from neuron_lens.autoencoders.splice import ErrorTerm, check_error_term, reference_error
from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.hooks import AutoencoderHooks, Handle, Run, TransformerHooks
from neuron_lens.hooks.autoencoder import GradientPath

__all__ = ["CrossLayerSplice", "splice_cross_layer"]


def splice_cross_layer(
    hooks: TransformerHooks,
    transcoder: CrossLayerTranscoder,
    *,
    site: tuple[str, str] | None = None,
    error: ErrorTerm = "keep",
    reference: Mapping[int | None, Tensor] | None = None,
    gradient: GradientPath = "both",
) -> CrossLayerSplice:
    """Put a cross-layer transcoder into a tree of hooks, at every layer, behind what is there already.

    Args:
        hooks: the tree that will be given to the model; changed in place.
        site: paths of the sites that are read and written; None: the transcoder's own.
        error: "keep" adds at each layer what the unedited transcoder misses there (without edits, nothing changes);
            "drop" leaves the predictions alone; "freeze" adds the errors of a reference run.
        reference: with "freeze", layer -> errors [batch or 1, position, d_out] by absolute position.
        gradient: with "keep", the path of gradients through the splice; see `AutoencoderHooks`.

    Returns:
        CrossLayerSplice: the tree of its own sites `latents`, `reconstruction` and `error`, each called once a layer.

    Raises:
        RequestError: no sites known, none of that name, or sites outside the blocks.
    """
    own = (transcoder.config.site_in, transcoder.config.site_out)
    if site is None and (own[0] is None or own[1] is None):
        raise RequestError(
            "this transcoder does not say which sites it was made for; pass site=(read, written), for instance "
            'site=("resid.torso.post_ln_mlp", "resid.torso.delta_mlp")'
        )
    paths = site if site is not None else tuple(each.path for each in own if each is not None)
    known = {each.path: each for each in hooks.sites()}
    if isinstance(paths, str) or len(paths) != 2:
        raise RequestError(f"site is the pair that is read and written; got {site!r}")
    for path in paths:
        if path not in known:
            raise RequestError(f"no site is called {path!r}; {did_you_mean(path, known)}")
        if not known[path].per_layer:
            raise RequestError(
                f"{path} belongs to no layer; a cross-layer transcoder reads and writes every one"
            )
    spliced = CrossLayerSplice(transcoder, paths, error=error, reference=reference, gradient=gradient)
    spliced.handles += hooks.append_to_path(f"{paths[0]}.fwd", spliced.read_at, handle=True)
    spliced.handles += hooks.append_to_path(f"{paths[1]}.fwd", spliced.write_at, handle=True)
    return spliced


class _Latents(NamedTuple):
    """What was read at a layer [batch, pos, d_latent]: before hooks, and after them (the same object: unchanged)."""

    plain: Tensor
    edited: Tensor
    x: Tensor  # the layer's input, for the skip term


class CrossLayerSplice(AutoencoderHooks):
    """A cross-layer transcoder in a tree of hooks: what `splice_cross_layer` returns.

    Its sites are `latents` [batch, pos, d_latent], `reconstruction` and `error` [batch, pos, d_out], with `layer` in the
    context.

    Attributes:
        transcoder: what is spliced in. handles: what `TransformerHooks.remove` takes to undo the splice.
    """

    def __init__(
        self,
        transcoder: CrossLayerTranscoder,
        paths: tuple[str, ...],
        *,
        error: ErrorTerm = "keep",
        reference: Mapping[int | None, Tensor] | None = None,
        gradient: GradientPath = "both",
    ) -> None:
        check_error_term(error, reference)
        super().__init__(transcoder.encode, transcoder.decode, error != "drop", gradient=gradient)
        self.transcoder, self.site_paths, self.reference = transcoder, paths, reference
        self.handles: list[Handle] = []

    @property
    def name(self) -> str:
        """For messages and printouts of the tree."""
        return f"splice of {self.transcoder.extra_repr()}"

    def read_at(self, x: Tensor, run: Run, layer: int) -> None:
        """Encode a layer's input, and keep its latents for this and later layers of the same pass."""
        n_layers = self.transcoder.config.n_layers
        if run.config is not None and run.config.n_layers != n_layers:
            raise RequestError(
                f"the transcoder has {n_layers} layers, the model {run.config.n_layers}: it was made for another model"
            )
        plain = self.transcoder.encode(x, layer)
        edited = self._changed(self.latents, plain, {"run": run, "layer": layer})
        held = run.carried.setdefault(id(self), {})
        held[layer] = _Latents(plain, plain if edited is None else edited, x)

    def write_at(self, y: Tensor, run: Run, layer: int) -> Tensor:
        """What takes the place of a layer's output y."""
        held: dict[int, _Latents] = run.carried.get(id(self), {})
        missing = [source for source in range(layer + 1) if source not in held]
        if missing:
            raise RequestError(
                f"layer {layer} is written from the latents of all layers up to it, but {self.site_paths[0]} of layers {missing} "
                f"was not computed in this pass: it must come before {self.site_paths[1]}, and the pass must start at layer 0"
            )
        sources = [held[source] for source in range(layer + 1)]
        x = held[layer].x
        reconstruction = self._fitting(self.decode([each.edited for each in sources], x=x), y)
        plain = reconstruction
        if self.add_error and any(each.edited is not each.plain for each in sources):
            plain = self._fitting(self.decode([each.plain for each in sources], x=x), y)
        if layer == self.transcoder.config.n_layers - 1:
            del run.carried[id(self)]
        return self._put_back(y, reconstruction, plain, {"run": run, "layer": layer})

    def _error_term(self, x: Tensor, plain: Tensor, context: dict[str, Any]) -> Tensor:
        if self.reference is None:
            return super()._error_term(x, plain, context)
        return reference_error(self.reference, x, context)
