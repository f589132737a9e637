"""Splicing: an autoencoder takes the place of what a site of a model holds, and its latents become sites.

    spliced = splice(hooks, autoencoder)                       # at its own site, error kept
    spliced.latents.append_fwd(AtUnits(42).append(torch.zeros_like))
    recording = spliced.record("latents")
    logits = model(tokens, hooks=hooks)
    recording["latents", 3]                                    # [batch, pos, d_latent]

A splice is one hook in the tree (a transcoder: one at the site it reads, one at the site it writes), so any
number of them and of other hooks stand side by side, and `hooks.remove(spliced.handles)` takes one out again.
Knows the tree of hooks and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from neuron_lens.autoencoders.autoencoder import Autoencoder
from neuron_lens.autoencoders.config import Site
from neuron_lens.autoencoders.normalisation import DecodeState
from neuron_lens.autoencoders.sparse import SparseLatents
from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.hooks import AtLayers, AutoencoderHooks, FwdBwdHooks, Handle, Run, TransformerHooks
from neuron_lens.hooks.autoencoder import GradientPath

__all__ = ["ErrorTerm", "Splice", "check_error_term", "reference_error", "reference_errors", "splice"]

ErrorTerm = Literal["keep", "drop", "freeze"]
_CHOICES = ("keep", "drop", "freeze")


def splice(
    hooks: TransformerHooks,
    autoencoder: Autoencoder,
    *,
    site: str | tuple[str, str] | None = None,
    layers: int | Iterable[int] | None = None,
    error: ErrorTerm = "keep",
    reference: Tensor | Mapping[int | None, Tensor] | None = None,
    gradient: GradientPath = "both",
    exclude_tokens: Iterable[int] = (),
    chain: Literal["fwd", "fwd2"] = "fwd",
) -> Splice:
    """Put an autoencoder or transcoder into a tree of hooks, behind what is there already.

    Args:
        hooks: the tree that will be given to the model; changed in place.
        site: path of the site, "resid.torso.post_mlp"; of a transcoder the pair it reads and writes. None: the
            autoencoder's own.
        layers: which layers, from 0 (of a transcoder: those it reads); None: the autoencoder's own.
        error: "keep" adds what the unedited autoencoder misses (without edits, nothing changes); "drop" leaves
            the reconstruction alone; "freeze" adds the error of a reference run, a constant.
        reference: with "freeze", the errors as `reference_errors` gives them: [batch or 1, position, d_out],
            or one such tensor for each layer.
        gradient: with "keep", the path of gradients through the splice; see `AutoencoderHooks`.
        exclude_tokens: token ids at whose positions the site keeps what it holds (and the error is zero).
        chain: of the site, where the splice goes: "fwd2" is behind the site's gradient hooks.

    Returns:
        Splice: the tree of its own sites `latents`, `reconstruction`, `error` and so on.

    Raises:
        RequestError: no site known or none of that name, layers at a site outside the blocks, no reference.
    """
    read, write = _sites(hooks, autoencoder, site)
    pairs = _layers(hooks, read, write, layers)
    spliced = Splice(
        autoencoder,
        error=error,
        reference=reference,
        gradient=gradient,
        read=read,
        write=write,
        exclude_tokens=exclude_tokens,
    )
    targets = [target for _, target in pairs]
    if read.path == write.path and all(source == target for source, target in pairs):
        spliced.handles += _append(hooks, f"{write.path}.{chain}", targets, spliced)
    else:
        sources = [source for source, _ in pairs]
        spliced.handles += _append(hooks, f"{read.path}.{chain}", sources, _Read(spliced, dict(pairs)))
        spliced.handles += _append(hooks, f"{write.path}.{chain}", targets, _Write(spliced))
    return spliced


class Splice(AutoencoderHooks):
    """An autoencoder in a tree of hooks: what `splice` returns.

    Its sites are, heads flat where the autoencoder reads them so,

    - `input` [batch, pos, d_in], what is encoded; the error is what is missed of the input before its hooks,
    - `pre_activations` and `latents` [batch, pos, d_latent],
    - `normalised_reconstruction` [batch, pos, d_out], latents @ W_dec + b_dec; `reconstruction`, with scale, mean
      and skip term; `error`; and `output`, their sum: what takes the place of the site.

    The autoencoder's dtype holds inside only: what leaves is of the site's. Where few latents are active and
    nothing hooks them, they are never made dense.

    Attributes:
        autoencoder: what is spliced in.
        handles: what `TransformerHooks.remove` takes to undo the splice.
    """

    input: FwdBwdHooks
    pre_activations: FwdBwdHooks
    normalised_reconstruction: FwdBwdHooks
    output: FwdBwdHooks

    def __init__(
        self,
        autoencoder: Autoencoder,
        *,
        error: ErrorTerm = "keep",
        reference: Tensor | Mapping[int | None, Tensor] | None = None,
        gradient: GradientPath = "both",
        read: Site | None = None,
        write: Site | None = None,
        exclude_tokens: Iterable[int] = (),
    ) -> None:
        check_error_term(error, reference)
        super().__init__(
            autoencoder.encode_with_state, autoencoder.decode, error != "drop", gradient=gradient
        )
        self.add_subhooks("pre_activations", FwdBwdHooks(("batch", "pos", "d_latent")))
        for name in ("input", "normalised_reconstruction", "output"):
            self.add_subhooks(name, FwdBwdHooks(("batch", "pos", "d_model")))
        self.autoencoder, self.read_site, self.write_site = autoencoder, read, write
        self.reference, self.exclude_tokens = reference, tuple(exclude_tokens)
        self.handles: list[Handle] = []

    @property
    def name(self) -> str:
        """For messages and printouts of the tree."""
        return f"splice of {self.autoencoder.extra_repr()}"

    def read(self, x: Tensor, **context: Any) -> Any:
        """Latents and decode state, sparse where few are active."""
        part, layer = _part(x, self.read_site), context.get("layer")
        if not (self.input.acts_at(layer) or self.pre_activations.acts_at(layer)):
            return self.autoencoder.encode_compact(part)
        changed = []

        def through(site: FwdBwdHooks) -> Callable[[Tensor], Tensor]:
            def hooked(value: Tensor) -> Tensor:
                edited = self._changed(site, value, context)
                changed.append(edited is not None)
                return value if edited is None else edited

            return hooked

        latents, state = self.autoencoder.encode_through(
            part, through(self.input), through(self.pre_activations)
        )
        if not (any(changed) and self.add_error):
            return latents, state
        return _Changed(latents, state, self.autoencoder.encode_compact(part))

    def write(self, x: Tensor, encoded: Any, **context: Any) -> Tensor:
        """What the site becomes, in its own layout and dtype."""
        part = _part(x, self.write_site)
        flat = part.flatten(-2) if self._writes_heads(part) else part
        written = super().write(flat, encoded, **context)
        if self.exclude_tokens:
            written = torch.where(self._excluded(flat, context), flat, written)
        if self.output.acts_at(context.get("layer")):
            written = self.output(written.clone() if written is flat else written, **context)
        written = written.reshape(part.shape)
        if self.write_site is None or self.write_site.head is None:
            return written
        index = torch.tensor([self.write_site.head], device=x.device)
        return x.index_copy(-2, index, written.unsqueeze(-2))

    def _writes_heads(self, x: Tensor) -> bool:
        config = self.autoencoder.config
        return config.flatten_heads and x.shape[-1] != config.d_out

    def _parts(self, encoded: Any) -> tuple[Any, list[Any]]:
        if isinstance(encoded, _Changed):
            return encoded.latents, [encoded.state]
        return super()._parts(encoded)

    def _changed_elsewhere(self, encoded: Any, context: dict[str, Any]) -> bool:
        return isinstance(encoded, _Changed) or self.normalised_reconstruction.acts_at(context.get("layer"))

    def _plain(self, encoded: Any, x: Tensor) -> Tensor:
        return super()._plain(encoded.plain if isinstance(encoded, _Changed) else encoded, x)

    def _decoded(
        self, latents: Any, state: list[Any], x: Tensor, context: dict[str, Any] | None = None
    ) -> Tensor:
        site = self.normalised_reconstruction
        if context is None or not site.acts_at(context.get("layer")):
            return super()._decoded(latents, state, x)
        hooked = site(self.autoencoder.decode_normalised(latents), **context)
        return self._fitting(self.autoencoder.denormalise(hooked, *state), x)

    def _editable(self, latents: Tensor | SparseLatents) -> Tensor:
        if isinstance(latents, SparseLatents):
            return latents.to_dense(self.autoencoder.config.d_latent)
        return super()._editable(latents)

    def _error_term(self, x: Tensor, plain: Tensor, context: dict[str, Any]) -> Tensor:
        known = self.reference
        error = x - plain if known is None else reference_error(known, x, context)
        return error.masked_fill(self._excluded(x, context), 0) if self.exclude_tokens else error

    def _excluded(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        """Where the tokens are that are left out [batch, pos, 1]."""
        run = context.get("run")
        if run is None or run.tokens is None:
            raise RequestError("exclude_tokens needs token ids, but this pass started from a residual stream")
        ids = torch.tensor(self.exclude_tokens, device=x.device)
        return torch.isin(run.tokens.to(x.device), ids)[:, :, None]


class _Changed(NamedTuple):
    """What `Splice.read` returns when hooks before the latents changed something and the error is needed too."""

    latents: Tensor
    state: DecodeState
    plain: tuple[Tensor | SparseLatents, DecodeState]  # without any hook


class _Read:
    """Encodes at the site a transcoder reads, and leaves the result for the site it writes.

    targets: layer read -> layer written.
    """

    def __init__(self, spliced: Splice, targets: dict[int | None, int | None]) -> None:
        self.spliced, self.targets = spliced, targets

    name = property(lambda self: f"read for {self.spliced.name}")

    def __call__(self, x: Tensor, run: Run, **context: Any) -> None:
        # the pass carries it, not the hook: two passes may be under way at once
        target = self.targets[context.get("layer")]
        run.carried[id(self.spliced), target] = self.spliced.read(x, run=run, **context)


class _Write:
    """Writes at a transcoder's other site."""

    def __init__(self, spliced: Splice) -> None:
        self.spliced = spliced

    name = property(lambda self: f"write of {self.spliced.name}")

    def __call__(self, x: Tensor, run: Run, **context: Any) -> Tensor:
        encoded = run.carried.pop((id(self.spliced), context.get("layer")), None)
        if encoded is None:
            read, write = self.spliced.read_site, self.spliced.write_site
            assert read is not None and write is not None, "splice gives both"
            raise RequestError(
                f"a transcoder writes {write.path} before {read.path}, which it reads, has been computed in this "
                "pass; it must read an earlier site, and the pass must not start behind it"
            )
        return self.spliced.write(x, encoded, run=run, **context)


def reference_errors(
    model: Callable[..., Any],
    tokens: Tensor,
    autoencoder: Autoencoder,
    *,
    site: str | tuple[str, str] | None = None,
    layers: int | Iterable[int] | None = None,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
) -> dict[int | None, Tensor]:
    """What an autoencoder misses on one run of a model, for `splice(…, error="freeze", reference=…)`.

    Args:
        model: called as model(tokens, hooks=…, pad=…), without gradients.
        tokens: [batch, pos]. pad: true where a column is padding [batch, pos].
        hooks: other hooks of that run.

    Returns:
        layer -> errors [batch, position, d_out] by absolute position, so that the same text may be padded otherwise.
    """
    tree = hooks.copy() if hooks is not None else TransformerHooks()
    spliced = splice(tree, autoencoder, site=site, layers=layers)
    kept: dict[int | None, Tensor] = {}

    def keep(error: Tensor, run: Run, layer: int | None = None) -> None:
        positions = run.positions(error.device)
        by_position = error.new_zeros(error.shape[0], int(positions.max()) + 1, error.shape[-1])
        row, column = (positions >= 0).nonzero(as_tuple=True)
        by_position[row, positions[row, column]] = error[row, column]
        kept[layer] = by_position

    spliced.error.append_fwd2(keep)
    with torch.no_grad():
        model(tokens, hooks=tree, pad=pad)
    return kept


def check_error_term(error: str, reference: Any) -> None:
    """Raise RequestError for a choice of error term there is none of, or that does not go with the reference."""
    if error not in _CHOICES:
        raise RequestError(f"error {error!r}: expected one of {', '.join(map(repr, _CHOICES))}")
    if (error == "freeze") != (reference is not None):
        raise RequestError(
            'error="freeze" adds the errors of a reference run: pass reference=reference_errors(…)'
            if reference is None
            else f'reference is for error="freeze", not {error!r}'
        )


def reference_error(
    known: Tensor | Mapping[int | None, Tensor], x: Tensor, context: dict[str, Any]
) -> Tensor:
    """The errors of a reference run at the layer of the context, at the columns of x [batch, pos, d_out]."""
    if not isinstance(known, Tensor):
        layer = context.get("layer")
        if layer not in known:
            raise RequestError(f"the reference errors hold layers {sorted(known, key=str)}, not {layer}")
        known = known[layer]
    return _at_positions(known.detach().to(x.device, x.dtype), x, context.get("run"))


def _at_positions(known: Tensor, x: Tensor, run: Run | None) -> Tensor:
    """Errors by absolute position [batch or 1, position, d_out], at the columns of x."""
    if known.ndim != 3 or known.shape[0] not in (1, x.shape[0]) or known.shape[-1] != x.shape[-1]:
        raise RequestError(
            f"the reference errors are {list(known.shape)}; expected [{x.shape[0]} or 1, position, {x.shape[-1]}]"
        )
    run = run or Run(x.shape[0], x.shape[1])
    positions = run.positions(x.device)
    beyond = int(positions.max())
    if beyond >= known.shape[1]:
        raise RequestError(
            f"the reference run has {known.shape[1]} positions, this one reaches position {beyond}: its error there "
            'is not known; make the reference longer, or use error="keep"'
        )
    rows = known.expand(x.shape[0], -1, -1)
    index = positions.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[-1])
    return rows.gather(1, index) * (positions >= 0)[:, :, None]


def _part(x: Tensor, site: Site | None) -> Tensor:
    return x if site is None or site.head is None else x.select(-2, site.head)


def _sites(
    hooks: TransformerHooks, autoencoder: Autoencoder, site: str | tuple[str, str] | None
) -> tuple[Site, Site]:
    """The sites read and written. Raises RequestError when they are not known or not there."""
    own_read, own_write = autoencoder.config.site_in, autoencoder.config.site_out
    if site is None:
        if own_read is None or own_write is None:
            raise RequestError(
                "this autoencoder does not say which site it was made for; pass site=…, for instance "
                'site="resid.torso.post_mlp", layers=3'
            )
        read, write = own_read, own_write
    else:
        paths = (site, site) if isinstance(site, str) else tuple(site)
        if len(paths) != 2:
            raise RequestError(f"site is one path, or the pair that is read and written; got {site!r}")
        read, write = (
            Site(path=path, layer=own.layer if own else None, head=own.head if own else None)
            for path, own in zip(paths, (own_read, own_write), strict=True)
        )
    known = [each.path for each in hooks.sites()]
    for path in (read.path, write.path):
        if path not in known:
            raise RequestError(f"no site is called {path!r}; {did_you_mean(path, known)}")
    return read, write


def _layers(
    hooks: TransformerHooks, read: Site, write: Site, layers: int | Iterable[int] | None
) -> list[tuple[int | None, int | None]]:
    """Pairs of layers, read and written; (None, None) for sites outside the blocks."""
    per_layer = {site.path: site.per_layer for site in hooks.sites()}
    inside = [per_layer[path] for path in (read.path, write.path)]
    if not all(inside):
        if layers is not None:
            outside = read.path if not inside[0] else write.path
            raise RequestError(f"{outside} belongs to no layer; leave layers out")
        return [(read.layer if inside[0] else None, write.layer if inside[1] else None)]
    if layers is None:
        if read.layer is None or write.layer is None:
            raise RequestError(f"say which layer of {write.path}: pass layers=…")
        return [(read.layer, write.layer)]
    chosen = [layers] if isinstance(layers, int) else list(layers)
    if not chosen:
        raise RequestError("layers is empty: name at least one layer, or leave it out")
    apart = 0 if read.layer is None or write.layer is None else write.layer - read.layer
    return [(layer, layer + apart) for layer in chosen]


def _append(hooks: TransformerHooks, path: str, layers: list[int | None], hook: Any) -> list[Handle]:
    chosen = [layer for layer in layers if layer is not None]
    placed = AtLayers(chosen).append(hook) if chosen else hook
    return hooks.append_to_path(path, placed, handle=True)
