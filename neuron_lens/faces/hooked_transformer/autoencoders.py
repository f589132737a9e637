"""Sparse autoencoders and transcoders on a HookedTransformer, by SAELens' names.

    model.add_sae(sae, use_error_term=True)
    logits, cache = model.run_with_cache(tokens)
    cache["blocks.3.hook_resid_post.hook_sae_acts_post"]       # [batch, pos, d_latent]

An attached autoencoder is a splice behind the hooks of its site: the site's own point stays, with its hooks, and shows
what the autoencoder reads. The autoencoder's parts are points of their own, below the name of the point it writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from neuron_lens.autoencoders import Autoencoder, Site, splice
from neuron_lens.autoencoders.sites import published_name
from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_transformer.generation import Generating
from neuron_lens.faces.hooked_transformer.hook_point import HookPoint
from neuron_lens.faces.hooked_transformer.translate import PointsAtSite, is_caching
from neuron_lens.hooks import TransformerHooks
from neuron_lens.hooks.autoencoder import GradientPath
from neuron_lens.hooks.chain import NOWHERE
from neuron_lens.shapes import Axis
from neuron_lens.transformer import TransformerConfig

__all__ = ["WithAutoencoders"]

# SAELens' names in the order of computation: the site of a splice, whether it belongs to the site that is read, axes.
_POINTS: dict[str, tuple[str, bool, tuple[Axis, ...]]] = {
    "hook_sae_input": ("input", True, ("batch", "pos", "d_model")),
    "hook_sae_acts_pre": ("pre_activations", True, ("batch", "pos", "d_latent")),
    "hook_sae_acts_post": ("latents", False, ("batch", "pos", "d_latent")),
    "hook_sae_recons": ("normalised_reconstruction", False, ("batch", "pos", "d_model")),
    "hook_sae_error": ("error", False, ("batch", "pos", "d_model")),
    "hook_sae_output": ("output", False, ("batch", "pos", "d_model")),
}
_WITH_HEADS = ("hook_sae_error", "hook_sae_output")  # shown in the layout of the site


@dataclass(eq=False)
class _Attached:
    """An autoencoder on a model, and its hook points."""

    sae: Autoencoder
    prefix: str  # what the names of its points begin with
    use_error_term: bool
    gradient: GradientPath
    exclude_tokens: tuple[int, ...] = ()  # where the site keeps what it holds
    points: dict[str, HookPoint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (_, _, axes) in _POINTS.items():
            self.points[name] = HookPoint()
            self.points[name].axes = axes

    def splice_into(
        self, tree: TransformerHooks, d_head: int, *, forward_only: bool = False, caching: bool = False
    ) -> None:
        """Add the splice to the tree of one forward, with the hooks that there are now."""
        spliced = splice(
            tree,
            self.sae,
            error="keep" if self.use_error_term else "drop",
            gradient=self.gradient if self.use_error_term else "both",
            # behind the gradient hooks of the site's own point, which so see the gradient of what the point shows
            chain="fwd2",
            exclude_tokens=self.exclude_tokens,
        )
        for name, point in self.points.items():
            path, at_read, _ = _POINTS[name]
            if name == "hook_sae_error" and not self.use_error_term:
                continue
            site, where = getattr(spliced, path), spliced.read_site if at_read else spliced.write_site
            assert where is not None, "splice gives both"
            for chain, handles in ((site.fwd, point.fwd_hooks), (site.bwd, point.bwd_hooks)):
                if not handles or (forward_only and chain is site.bwd):
                    continue
                hooks = PointsAtSite(copy_first=caching and chain is site.fwd)
                hooks.points[where.layer] = (point, tuple(handles))
                flat = name in _WITH_HEADS and self._writes_heads
                chain.append(_WithHeads(hooks, d_head) if flat else hooks)

    def settings(self) -> dict[str, Any]:
        """What `add_sae` was told."""
        return {name: self.__dict__[name] for name in ("use_error_term", "gradient", "exclude_tokens")}

    @property
    def _writes_heads(self) -> bool:
        config = self.sae.config
        return config.flatten_heads and config.d_in == config.d_out


class _WithHeads:
    """Hooks that see [batch, pos, head, d_head] where the splice holds heads flat."""

    def __init__(self, hooks: PointsAtSite, d_head: int) -> None:
        self.hooks, self.d_head = hooks, d_head

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        return self.hooks._run(x.unflatten(-1, (-1, self.d_head)), context, NOWHERE).flatten(-2)


class WithAutoencoders(Generating):
    """`add_sae` and what goes with it.

    Two things are unlike SAELens on purpose: a second autoencoder at a site stands behind the first instead of
    replacing it (its points are named `….2.hook_sae_input` and so on; adding the same object again changes its
    settings), and neither adding nor resetting one touches the user's hooks or the site's own point.
    """

    @property
    def _attached(self) -> dict[str, _Attached]:
        found: dict[str, _Attached] = self.__dict__.setdefault("_attached_saes", {})
        return found

    @property
    def acts_to_saes(self) -> dict[str, Autoencoder]:
        """The attached autoencoders, by the name of the hook point they read (`….2` for a second one there)."""
        return {name: attached.sae for name, attached in self._attached.items()}

    def add_sae(
        self,
        sae: Autoencoder,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        *,
        gradient: GradientPath = "reconstruction",
    ) -> None:
        """Attach an autoencoder or transcoder at its own site, until `reset_saes`.

        Args:
            sae: what `load_autoencoder` gives, or a trained one; its config says the site.
            use_error_term: add what the unedited autoencoder misses, so that without edits nothing changes.
            exclude_special_tokens: leave out the positions of the tokenizer's BOS, EOS and PAD tokens, or of the given
                ids: there the site keeps what it holds.
            gradient: with the error term, the path gradients take through the site: "reconstruction" treats the
                error as a constant, as SAELens does; "both" is exact. See `AutoencoderHooks`.

        Raises:
            RequestError: not an autoencoder of this library, no site known, a site or layer this model does not have,
                or another width.
        """
        if not isinstance(sae, Autoencoder):
            raise RequestError(
                f"add_sae takes a neuron_lens Autoencoder, not a {type(sae).__name__}; "
                "load_autoencoder(folder) reads what SAELens' save_model writes"
            )
        excluded = self._excluded_ids(exclude_special_tokens)
        known = next((each for each in self._attached.values() if each.sae is sae), None)
        if known is not None:
            known.use_error_term, known.gradient = bool(use_error_term), gradient
            known.exclude_tokens = excluded
            return
        _check_fit(sae, self.engine.config)
        config = sae.config
        assert config.site_in is not None and config.site_out is not None, "the check has seen to it"
        name = _free(self._point_name(config.site_in), self._attached)
        prefix = _free(self._point_name(config.site_out), [each.prefix for each in self._attached.values()])
        attached = _Attached(sae, prefix, bool(use_error_term), gradient, excluded)
        attached.splice_into(TransformerHooks(), self.cfg.d_head)  # raises now, not in the first forward
        self._attached[name] = attached
        self.setup()

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Take autoencoders off; the hooks on their own points go with them, all others stay.

        Args:
            act_names: names in `acts_to_saes`; that of a hook point stands for all that read it. None: every one.

        Raises RequestError when nothing is attached there.
        """
        if act_names is None:
            self._attached.clear()
        for name in [act_names] if isinstance(act_names, str) else act_names or ():
            found = [key for key in self._attached if key == name or _without_number(key) == name]
            if not found:
                hint = did_you_mean(name, self._attached) if self._attached else "none is attached anywhere"
                raise RequestError(f"no autoencoder is attached at {name!r}; {hint}")
            for key in found:
                del self._attached[key]
        self.setup()

    @contextmanager
    def saes(
        self,
        saes: Autoencoder | Sequence[Autoencoder] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> Iterator[Self]:
        """Autoencoders that are there inside the `with` block, beside those attached before.

        reset_saes_end: afterwards, exactly those from before are attached, as they were.
        """
        before = [(name, each, each.settings()) for name, each in self._attached.items()]
        try:
            for sae in [saes] if isinstance(saes, Autoencoder) else saes:
                self.add_sae(sae, use_error_term, exclude_special_tokens)
            yield self
        finally:
            if reset_saes_end:
                self._attached.clear()
                for name, each, settings in before:
                    each.__dict__.update(settings)
                    self._attached[name] = each
                self.setup()

    def run_with_saes(
        self,
        *model_args: Any,
        saes: Autoencoder | Sequence[Autoencoder] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **model_kwargs: Any,
    ) -> Any:
        """One forward with autoencoders attached (see `saes`); the rest as in `forward`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self(*model_args, **model_kwargs)

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: Autoencoder | Sequence[Autoencoder] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **kwargs: Any,
    ) -> Any:
        """One forward with autoencoders attached, and its cache; the rest as in `run_with_cache`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_cache(*model_args, **kwargs)

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: Autoencoder | Sequence[Autoencoder] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **kwargs: Any,
    ) -> Any:
        """One forward with autoencoders and hooks, those on the autoencoders' points too; the rest as in `run_with_hooks`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_hooks(*model_args, **kwargs)

    def _hookable_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super()._hookable_modules()
        for attached in self._attached.values():
            for name, point in attached.points.items():
                yield f"{attached.prefix}.{name}", point

    def _hook_tree(self, *, forward_only: bool = False) -> TransformerHooks | None:
        tree = super()._hook_tree(forward_only=forward_only)
        if not self._attached:
            return tree
        caching = any(is_caching(handle) for point in self.hook_points() for handle in point.fwd_hooks)
        tree = TransformerHooks() if tree is None else tree
        for attached in self._attached.values():
            attached.splice_into(tree, self.cfg.d_head, forward_only=forward_only, caching=caching)
        return tree

    def _excluded_ids(self, exclude: bool | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(exclude, bool):
            return tuple(int(token) for token in exclude)
        if not exclude:
            return ()
        tokenizer = self._need_tokenizer()
        return tuple(
            each for each in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if each is not None
        )

    def _point_name(self, site: Site) -> str:
        """The name of a site's hook point; where it has none, the name it is published under, or its path."""
        for name, place in self._places.items():
            if (place.site, place.layer) == (site.path, site.layer):
                return name
        return published_name(site) or site.path


def _check_fit(sae: Autoencoder, config: TransformerConfig) -> None:
    """Raise RequestError where an autoencoder cannot belong to a model."""
    absent, widths = config.absent_sites(), _widths(config)
    axes = {site.path: site.axes or () for site in TransformerHooks().sites()}
    for site, width in ((sae.config.site_in, sae.config.d_in), (sae.config.site_out, sae.config.d_out)):
        if site is None:
            raise RequestError(
                "this autoencoder does not say which site it was made for: load_autoencoder(…, overrides="
                '{"site_in": Site(path="resid.torso.post_mlp", layer=3)}) tells it'
            )
        if site.path in absent:
            raise RequestError(f"{site.path} never fires in this model: {absent[site.path]}")
        if site.layer is not None and not 0 <= site.layer < config.n_layers:
            raise RequestError(
                f"the autoencoder is for layer {site.layer}; this model has layers 0 to {config.n_layers - 1}"
            )
        last = [axis for axis in axes.get(site.path, ())[2:] if axis in widths]
        if site.head is not None:
            last = last[-1:]
        expected = 1
        for axis in last:
            expected *= widths[axis]
        if last and width != expected:
            raise RequestError(
                f"the autoencoder is {width} wide at {site.path}, which is {expected} wide in this model; "
                "is it spliced into another site, or made for another model?"
            )


def _widths(config: TransformerConfig) -> dict[str, int]:
    return {
        "head": config.n_heads,
        "kv_head": config.n_kv_heads,
        "d_head": config.d_head,
        "d_model": config.d_model,
        "d_mlp": config.d_mlp,
        "d_vocab": config.d_vocab,
    }


def _free(name: str, taken: Any) -> str:
    """The name, or with the first number from 2 that is not taken."""
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}.{number}", number + 1
    return free


def _without_number(name: str) -> str:
    head, _, last = name.rpartition(".")
    return head if last.isdigit() else name
