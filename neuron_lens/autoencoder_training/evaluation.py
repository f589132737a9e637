"""How good an autoencoder is: on text it was not trained on, against doing without the site.

Loss recovered compares the model's loss with the reconstruction in place of the site to its loss with
zeros, or with the mean activation, there: 1 is the intact model's loss, 0 the ablated one's. Everything is
replaced but the beginning-of-sequence token, on which autoencoders are not trained here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from neuron_lens.autoencoder_training.absorption import (
    TOKEN_CLASSES,
    ActiveLatents,
    ClassAbsorption,
    active_latents,
    measure_absorption,
)
from neuron_lens.autoencoder_training.stream import kept_columns, rows_of_split
from neuron_lens.autoencoders import Autoencoder, Splice, splice
from neuron_lens.errors import RequestError
from neuron_lens.harvest.run import model_inputs
from neuron_lens.hooks import AtLayers, TransformerHooks

if TYPE_CHECKING:
    from neuron_lens.harvest.corpus import Corpus, Row
    from neuron_lens.transformer import Transformer

__all__ = ["Evaluation", "evaluate_autoencoder"]

_BATCH_ROWS = 16
# log10 of the share of tokens a latent fires on
_DENSITY_EDGES = tuple(-6 + 0.5 * step for step in range(13))


class Evaluation(BaseModel):
    """Figures of one autoencoder on one text. Losses are nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    site: str
    layer: int | None
    corpus: str
    split: str
    n_tokens: int  # whose activations were encoded
    n_loss_tokens: int  # of those, the ones with a next token
    d_latent: int
    variance_explained: float
    mean_squared_error: float  # per token, summed over the width
    l0: float  # active latents per token
    loss_intact: float
    loss_spliced: float  # with the reconstruction, without the error
    loss_zero: float
    loss_mean: float
    loss_recovered_zero: float | None  # None where the ablation costs nothing
    loss_recovered_mean: float | None
    never_fired: int  # latents that fired on none of these tokens
    dead_share: float  # the same as a share of all
    dense: int  # latents that fire on more than one token in ten
    density_edges: tuple[float, ...]  # log10 of the share of tokens a latent fires on
    density_counts: tuple[int, ...]  # latents in each bin; the outermost bins take what lies beyond
    absorption: tuple[ClassAbsorption, ...] = ()  # classes of tokens that could be judged
    absorption_rate: float | None = None  # mean of those classes' rates
    absorbing_latents: int | None = None  # distinct latents that speak in the place of a class's own


@torch.inference_mode()
def evaluate_autoencoder(
    model: Transformer,
    autoencoder: Autoencoder,
    corpus: Corpus,
    *,
    site: str | tuple[str, str] | None = None,
    layer: int | None = None,
    split: str = "test",
    max_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
    absorption_tokens: int = 16_384,
) -> Evaluation:
    """Evaluate an autoencoder or transcoder.

    Args:
        site, layer: where it belongs; its own by default.
        split: part of the corpus that is read; training reads "train" of the same seed, so "test" and
            "validation" are new to it. "all" reads everything.
        max_tokens: stop after about so many tokens.
        seed: of the division of the corpus into parts.
        absorption_tokens: tokens, the first ones, on which absorption is measured (see `absorption`); 0 for none.

    Raises:
        RequestError: no text in that part, a width that does not fit, a site that is not known.
    """
    parts = ("train", "validation", "test") if split == "all" else (split,)
    rows = [row for part in parts for row in rows_of_split(model, corpus, part, seed)]
    rows = _limited(rows, max_tokens)
    if not rows:
        raise RequestError(
            f"the part {split!r} of the corpus {corpus.name} has no text; expected 'train', 'validation', 'test' or "
            "'all', and a longer corpus where it is short"
        )
    spliced = splice(TransformerHooks(), autoencoder, site=site, layers=layer, error="drop")
    tally = _Tally(model, autoencoder, spliced, layer, absorption_tokens)
    batches = [rows[first : first + _BATCH_ROWS] for first in range(0, len(rows), _BATCH_ROWS)]
    for batch in tqdm(batches, desc="activations", unit="batch", disable=not progress):
        tally.activations(batch)
    for batch in tqdm(batches, desc="losses", unit="batch", disable=not progress):
        tally.losses(batch)
    return tally.result(corpus.name, split)


class _Tally:
    """Running sums over batches of rows; activations first, since the mean is needed for the losses."""

    def __init__(
        self,
        model: Transformer,
        autoencoder: Autoencoder,
        spliced: Splice,
        layer: int | None,
        absorption_tokens: int,
    ) -> None:
        assert spliced.read_site is not None and spliced.write_site is not None, "splice gives both"
        self.model, self.autoencoder, self.spliced = model, autoencoder, spliced
        self.read, self.write = spliced.read_site, spliced.write_site
        self.shift = None if layer is None or self.read.layer is None else layer - self.read.layer
        self.fired = torch.zeros(autoencoder.config.d_latent, dtype=torch.float64)
        self.n, self.error, self.squares = 0, 0.0, 0.0
        self.sum: Tensor | None = None
        self.loss = torch.zeros(4, dtype=torch.float64)
        self.n_loss = 0
        self.chosen = layer
        self.wanted, self.sampled = absorption_tokens, _Sample()

    def activations(self, rows: Sequence[Row]) -> None:
        """Sums of what the site holds and of what the reconstruction misses."""
        caught: dict[str, Tensor] = {}

        def keep(x: Tensor, encoded: Any, here: Tensor) -> Tensor:
            caught["target"] = x
            caught["predicted"] = self.spliced.write(x, encoded)
            latents = encoded[0]
            dense = latents if isinstance(latents, Tensor) else latents.to_dense(len(self.fired))
            caught["latents"] = dense
            return x

        _, kept, tokens, _ = self._run(rows, keep)
        target = caught["target"][kept].flatten(1).double()
        missed = target - caught["predicted"][kept].flatten(1).double()
        self.n += len(target)
        self.sum = target.sum(0) if self.sum is None else self.sum + target.sum(0)
        self.squares += float(target.square().sum())
        self.error += float(missed.square().sum())
        latents = caught["latents"][kept]
        self.fired += (latents != 0).sum(0).double().cpu()
        still = self.wanted - self.sampled.n
        if still > 0:
            self.sampled.add(tokens[kept][:still], target[:still], latents[:still])

    def losses(self, rows: Sequence[Row]) -> None:
        """Summed next-token losses at kept tokens: intact, spliced, zero, mean."""
        assert self.sum is not None, "activations come first"
        mean = self.sum / self.n

        def replaced(value: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any, Tensor], Tensor]:
            def change(x: Tensor, encoded: Any, here: Tensor) -> Tensor:
                new = value(x, encoded).to(x.dtype).expand_as(x)
                return torch.where(here.view(*here.shape, *[1] * (x.ndim - 2)), new, x)

            return change

        ways = [
            None,
            replaced(self.spliced.write),
            replaced(lambda x, _: x.new_zeros(())),
            replaced(lambda x, _: mean.reshape(x.shape[2:])),
        ]
        for place, way in enumerate(ways):
            logits, kept, tokens, pad = self._run(rows, way)
            counted = kept[:, :-1] & ~pad[:, 1:]
            losses = functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none"
            )
            self.loss[place] += float(losses[counted].double().sum())
        self.n_loss += int(counted.sum())

    def _run(
        self, rows: Sequence[Row], change: Callable[[Tensor, Any, Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, kept columns, tokens and padding of some rows, with `change` at the site written."""
        tokens, pad, first = model_inputs(self.model, [row.ids for row in rows])
        kept = kept_columns(rows, tokens.shape[1], first).to(tokens.device)
        hooks = TransformerHooks()
        if change is not None:
            here = ~pad
            here[:, :first] = False
            encoded: list[Any] = []
            _at(
                hooks,
                self.read.path,
                self._layer(self.read.layer),
                lambda x: encoded.append(self.spliced.read(x)),
            )
            _at(
                hooks,
                self.write.path,
                self._layer(self.write.layer),
                lambda x: change(x, encoded.pop(), here),
            )
        logits: Tensor = self.model(tokens, hooks=hooks, pad=pad if pad.any() else None)
        return logits, kept, tokens, pad

    def _layer(self, own: int | None) -> int | None:
        return self.chosen if own is None else own + (self.shift or 0)

    def result(self, corpus: str, split: str) -> Evaluation:
        """All figures."""
        assert self.sum is not None, "there were rows"
        variance = self.squares - float(self.sum.square().sum()) / self.n
        intact, spliced, zero, mean = (self.loss / max(self.n_loss, 1)).tolist()
        share = self.fired / self.n
        logs = share.clamp(min=10 ** _DENSITY_EDGES[0]).log10().clamp(max=_DENSITY_EDGES[-1])
        counts = torch.histogram(logs, torch.tensor(_DENSITY_EDGES, dtype=torch.float64)).hist
        never = int((self.fired == 0).sum())
        absorption = self.sampled.absorption(self.model, self.autoencoder) if self.sampled.n else ()
        absorbing = {latent for each in absorption for latent in each.absorbing_latents}
        return Evaluation(
            model=self.model.config.name or "model",
            site=self.write.path,
            layer=self._layer(self.write.layer),
            corpus=corpus,
            split=split,
            n_tokens=self.n,
            n_loss_tokens=self.n_loss,
            d_latent=len(self.fired),
            variance_explained=1 - self.error / variance,
            mean_squared_error=self.error / self.n,
            l0=float(share.sum()),
            loss_intact=intact,
            loss_spliced=spliced,
            loss_zero=zero,
            loss_mean=mean,
            loss_recovered_zero=_recovered(intact, spliced, zero),
            loss_recovered_mean=_recovered(intact, spliced, mean),
            never_fired=never,
            dead_share=never / len(self.fired),
            dense=int((share > 0.1).sum()),
            density_edges=_DENSITY_EDGES,
            density_counts=tuple(int(count) for count in counts),
            absorption=absorption,
            absorption_rate=sum(each.rate for each in absorption) / len(absorption) if absorption else None,
            absorbing_latents=len(absorbing) if absorption else None,
        )


class _Sample:
    """The first tokens, with what the site held and which latents fired."""

    def __init__(self) -> None:
        self.n = 0
        self.tokens: list[Tensor] = []
        self.activations: list[Tensor] = []
        self.latents: list[ActiveLatents] = []

    def add(self, tokens: Tensor, activations: Tensor, latents: Tensor) -> None:
        """tokens [token], activations [token, d_out] and dense latents [token, d_latent]."""
        entries = active_latents(latents.cpu())
        self.latents.append(entries._replace(token=entries.token + self.n))
        self.tokens.append(tokens.cpu())
        self.activations.append(activations.float().cpu())
        self.n += len(tokens)

    def absorption(self, model: Transformer, autoencoder: Autoencoder) -> tuple[ClassAbsorption, ...]:
        """For the classes that a token's text tells."""
        tokens, where = torch.cat(self.tokens).unique(return_inverse=True)
        texts = model.tokenizer.token_strings(tokens.tolist())
        classes = {
            name: torch.tensor([belongs(text) for text in texts])[where]
            for name, belongs in TOKEN_CLASSES.items()
        }
        entries = ActiveLatents(*(torch.cat(parts) for parts in zip(*self.latents, strict=True)))
        return measure_absorption(
            torch.cat(self.activations), entries, autoencoder.W_dec.detach().cpu(), classes
        )


def _at(hooks: TransformerHooks, path: str, layer: int | None, hook: Callable[[Tensor], Any]) -> None:
    hooks.append_to_path(f"{path}.fwd", hook if layer is None else AtLayers(layer).append(hook))


def _recovered(intact: float, spliced: float, ablated: float) -> float | None:
    return None if ablated <= intact else (ablated - spliced) / (ablated - intact)


def _limited(rows: Sequence[Row], max_tokens: int | None) -> list[Row]:
    """Rows in their order, until they hold so many tokens."""
    if max_tokens is None:
        return list(rows)
    taken, total = [], 0
    for row in rows:
        if total >= max_tokens:
            break
        taken.append(row)
        total += len(row.ids) - row.keep_from
    return taken
