"""The transformer: embedding, blocks, final norm, unembedding, with the hook tree as an argument."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_lens.errors import HookError, RequestError
from neuron_lens.hooks import Run, TransformerHooks
from neuron_lens.hooks.sites import silent_tree
from neuron_lens.transformer.block import Block
from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.frame import Frame
from neuron_lens.transformer.functional import softcap
from neuron_lens.transformer.kv_cache import KVCache
from neuron_lens.transformer.norm import Norm

if TYPE_CHECKING:
    from neuron_lens.transformer.prompts import Prompts
    from neuron_lens.transformer.sampling import GeneratedToken, Generation

__all__ = ["Transformer"]

# Shared by all passes without hooks; nobody can reach it to append to it.
_NO_HOOKS = silent_tree()


class Transformer(nn.Module):
    """A decoder-only transformer of the parts its configuration chooses.

    Holds no hook state: hooks are an argument of the call. `tokenizer` travels with the model (None when there is none).
    `loaded_from` is the name or path that opens the same checkpoint again without any option, where there is one.

    Args:
        config: what the model is made of.
        seed: weights are drawn from N(0, 0.02²) with this seed; None leaves them as torch allocates them.
    """

    loaded_from: str | None = None

    def __init__(self, config: TransformerConfig, *, seed: int | None = 0, tokenizer: Any = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        if config.position == "learned":
            self.pos_embed = nn.Embedding(config.n_ctx + config.position_offset, config.d_model)
        self.embed_norm = Norm(config, config.d_model) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_f = Norm(config, config.d_model) if config.final_norm and config.norm != "none" else None
        self.unembed = nn.Linear(config.d_model, config.d_vocab_out, bias=config.unembed_bias)
        if config.tied:
            self.unembed.weight = self.embed.weight
        if seed is not None:
            self._initialise(seed)

    @classmethod
    def load(cls, name_or_path: str, **options: Any) -> Transformer:
        """Open a checkpoint: a shipped or hub name, a folder, or a remote path. See `neuron_lens.loading.load`."""
        from neuron_lens.loading import load  # loading stands above the model, so it is asked for when needed

        model: Transformer = load(name_or_path, **options)
        return model

    def sample(self, prompts: Prompts, **options: Any) -> Generation | list[Generation]:
        """Continue prompts: `neuron_lens.transformer.sampling.sample` of this model, with its options."""
        from neuron_lens.transformer.sampling import sample  # sampling stands above the model

        return sample(self, prompts, **options)

    def stream(self, prompts: Prompts, **options: Any) -> Iterator[GeneratedToken]:
        """Continue prompts, token by token: `neuron_lens.transformer.sampling.stream` of this model, with its options."""
        from neuron_lens.transformer.sampling import stream

        return stream(self, prompts, **options)

    def forward(
        self,
        tokens: Tensor,
        *,
        hooks: TransformerHooks | None = None,
        pad: Tensor | None = None,
        kv_cache: KVCache | None = None,
        start_at_layer: int = 0,
        stop_at_layer: int | None = None,
        logits_at: int | Tensor | slice | None = None,
        logits_of: Tensor | None = None,
        run: Run | None = None,
    ) -> Tensor:
        """Run the model.

        Args:
            tokens: ids [batch, pos]; or, with `start_at_layer`, the residual stream entering that block
                [batch, pos, d_model].
            hooks: the tree of hooks for this call; None for none.
            pad: true where a column is padding [batch, pos], on either side; a row then gives what it gives alone.
            kv_cache: keys and values of earlier columns; advanced by this call unless frozen.
            start_at_layer: block to begin with (0 embeds tokens).
            stop_at_layer: return the stream entering this block, without running it (n_layers: leaving the last).
            logits_at: columns to unembed: an index, a slice, or a long tensor [batch] with one column for each row;
                None for all. Saves the largest product when only some logits are read, and most of the last block:
                unless something is hooked there behind its keys and values, it runs for those columns only.
            logits_of: vocabulary entries [k] to unembed, a long tensor; None for all.
            run: what hooks are told of this pass; made here unless a generation loop has more to tell.

        Returns:
            logits [batch, pos, d_vocab] (pos and d_vocab as many as were asked for), or the stream [batch, pos, d_model].

        Raises:
            RequestError: tokens of a wrong type, shape or range, a prompt that is empty or longer than the
                context, layers that do not exist, padding that does not fit.
            HookError: a hooked site never fires in this model, or names layers it does not have.
        """
        stop = self._checked(tokens, pad, kv_cache, start_at_layer, stop_at_layer, run, logits_of)
        hooks = _NO_HOOKS if hooks is None else self._checked_hooks(hooks)
        run = run or self._describe(tokens, pad, kv_cache)
        weight = self.embed.weight
        frame = Frame.make(self.config, run, kv_cache, tokens.device, weight.dtype)
        run = frame.run
        x = self._embedded(tokens, frame, hooks, run) if tokens.dim() == 2 else tokens
        columns = None
        if logits_at is not None and stop_at_layer is None:
            columns = _columns_named(logits_at, run, tokens.device)
        narrows = columns is not None and start_at_layer < stop and self._narrows(columns, run, hooks)
        for layer in range(start_at_layer, stop - narrows):
            x = self.blocks[layer](x, hooks, frame, layer=layer, run=run)
        if columns is not None:
            reading = frame.reading(columns)
            x = self.blocks[-1](x, hooks, reading, layer=stop - 1, run=run) if narrows else reading.wanted(x)
        if kv_cache is not None:
            kv_cache.advance(None if run.uniform else run.positions(tokens.device), run.length)
        if stop_at_layer is not None:
            return x
        if columns is not None:
            run = run.select_columns(columns.expand(run.batch, -1))
        return self._unembedded(x, hooks, run, logits_of)

    def _narrows(self, columns: Tensor, run: Run, hooks: TransformerHooks) -> bool:
        """Whether the last block may run for these columns only."""
        last = self.blocks[-1]
        assert isinstance(last, Block), "blocks are Blocks"
        return columns.shape[1] < run.length and not last.needs_all_columns(hooks)

    def _embedded(self, tokens: Tensor, frame: Frame, hooks: TransformerHooks, run: Run) -> Tensor:
        """The stream entering block 0."""
        x = hooks.emb.tok(self.embed(tokens), run=run)
        if self.config.embedding_scale != 1.0:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.config.position == "learned":
            positions = (frame.positions + self.config.position_offset).expand(tokens.shape[0], -1)
            x = x + hooks.emb.pos(self.pos_embed(positions), run=run)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return hooks.resid.post_emb(x, run=run)

    def _unembedded(
        self, x: Tensor, hooks: TransformerHooks, run: Run, logits_of: Tensor | None = None
    ) -> Tensor:
        """The stream leaving the last block -> logits, of some vocabulary entries."""
        if self.ln_f is not None:
            x = self.ln_f(x, hooks.resid.ln_f, run=run)
        x = hooks.resid.post_ln_f(x, run=run)
        few = logits_of is not None and not hooks.logits.has_any()  # hooks of the logits see them all
        logits = self._unembedded_few(x, logits_of) if few else self.unembed(x)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        logits = hooks.logits(softcap(logits, self.config.logit_softcap), run=run)
        return logits if few or logits_of is None else logits[..., logits_of.to(logits.device)]

    def _unembedded_few(self, x: Tensor, entries: Tensor | None) -> Tensor:
        """The unembedding's product with some of its rows. entries: vocabulary ids [k]"""
        assert entries is not None, "asked only when some are named"
        entries, bias = entries.to(x.device), self.unembed.bias
        return F.linear(x, self.unembed.weight[entries], None if bias is None else bias[entries])

    def _describe(self, tokens: Tensor, pad: Tensor | None, cache: KVCache | None) -> Run:
        ids = tokens if tokens.dim() == 2 else None
        starts = 0 if cache is None else cache.starts
        return Run(tokens.shape[0], tokens.shape[1], ids, pad, starts, config=self.config)

    def _checked(
        self,
        tokens: Tensor,
        pad: Tensor | None,
        cache: KVCache | None,
        start: int,
        stop: int | None,
        run: Run | None,
        logits_of: Tensor | None,
    ) -> int:
        """Refuse what cannot run; returns the block to stop before."""
        n_layers, config = self.config.n_layers, self.config
        if stop is not None and stop < 0:
            stop += n_layers
        end = n_layers if stop is None else stop
        if not 0 <= start <= end <= n_layers:
            raise RequestError(
                f"start_at_layer {start} and stop_at_layer {stop} do not fit a model of {n_layers} layers"
            )
        if start == 0 and (tokens.dim() != 2 or tokens.dtype not in (torch.long, torch.int)):
            raise RequestError(
                f"tokens must be whole numbers [batch, pos]; got {tokens.dtype} {list(tokens.shape)}"
            )
        if start > 0 and (tokens.dim() != 3 or tokens.shape[-1] != config.d_model):
            raise RequestError(
                f"start_at_layer={start} takes the residual stream [batch, pos, {config.d_model}]; got {list(tokens.shape)}"
            )
        if 0 in tokens.shape:
            raise RequestError(f"the prompt is empty: tokens have shape {list(tokens.shape)}")
        if pad is not None and (pad.shape != tokens.shape[:2] or pad.dtype != torch.bool):
            raise RequestError(
                f"pad must be bool {list(tokens.shape[:2])}; got {pad.dtype} {list(pad.shape)}"
            )
        if cache is not None:
            cache.check_room(tokens.shape[0], tokens.shape[1])
        if not torch.compiler.is_compiling():
            _check_values(tokens, pad, cache, config)
            if logits_of is not None:
                _check_vocabulary(logits_of, config.d_vocab_out, "logits_of")
        return end

    def _checked_hooks(self, hooks: TransformerHooks) -> TransformerHooks:
        """Refuse hooks at sites and layers this model does not have."""
        hooked = hooks.hooked_sites()
        if not hooked:
            return _NO_HOOKS
        absent = self.config.absent_sites()
        for site in hooked:
            if site.path in absent and site.acts_at(None):
                raise HookError(f"{site.path} never fires in this model: {absent[site.path]}")
            named = site.fwd.layers_named() | site.bwd.layers_named() | site.fwd2.layers_named()
            beyond = sorted(layer for layer in named if layer >= self.config.n_layers)
            if beyond:
                raise HookError(
                    f"{site.path}: layers {beyond} do not exist: the model has {self.config.n_layers}, from 0"
                )
        return hooks

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1 and "norm" not in name and "ln_" not in name:
                    parameter.normal_(0, 0.02, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()

    def __deepcopy__(self, memo: dict[int, Any]) -> Transformer:
        # torch's deepcopy would untie tied weights only by accident of memo order; this states it.
        clone = type(self)(self.config, seed=None, tokenizer=self.tokenizer)
        memo[id(self)] = clone
        clone.to(device=self.embed.weight.device, dtype=self.embed.weight.dtype)
        clone.load_state_dict(self.state_dict())
        return clone.train(self.training)


def _columns_named(logits_at: int | Tensor | slice, run: Run, device: torch.device) -> Tensor:
    """The columns whose logits are wanted, [batch or 1, columns]. Raises RequestError when the pass has no such column."""
    length = run.length
    if isinstance(logits_at, Tensor):
        columns = logits_at.to(device).reshape(run.batch, -1)
    else:
        chosen = [logits_at] if isinstance(logits_at, int) else list(range(length)[logits_at])
        columns = torch.tensor([[c + length if c < 0 else c for c in chosen]], device=device)
    if not torch.compiler.is_compiling() and columns.numel():
        low, high = torch.aminmax(columns)
        if int(low) < 0 or int(high) >= length:
            raise RequestError(f"logits_at {logits_at!r} names columns that a pass of {length} does not have")
    return columns.long()


def _check_vocabulary(ids: Tensor, size: int, what: str) -> None:
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= size:
        wrong = int(low) if int(low) < 0 else int(high)
        raise RequestError(f"{what} {wrong} is outside the vocabulary of {size}")


def _check_values(
    tokens: Tensor, pad: Tensor | None, cache: KVCache | None, config: TransformerConfig
) -> None:
    """Refuse ids outside the vocabulary, rows of nothing but padding, and sequences longer than the context."""
    if tokens.dim() == 2:
        _check_vocabulary(tokens, config.d_vocab, "token id")
    longest = tokens.shape[1]
    if pad is not None:
        real = (~pad).sum(-1)
        longest = int(real.max())
        if bool((real == 0).any()) and cache is None:
            raise RequestError(f"row {int((real == 0).nonzero()[0])} is nothing but padding")
        # generation pads short prompts on the left and finished rows on the right; real tokens stand together
        begun = (pad[:, :-1] & ~pad[:, 1:]).sum(-1) + (~pad[:, 0]).long()
        if bool((begun > 1).any()):
            raise RequestError(
                f"padding must stand at the ends of a row; row {int((begun > 1).nonzero()[0])} has it elsewhere"
            )
    if cache is not None:
        starts = cache.starts
        longest += int(starts.max()) if isinstance(starts, Tensor) else starts
    if longest > config.n_ctx and config.position == "learned":
        raise RequestError(
            f"{longest} tokens exceed the model's context of {config.n_ctx}; shorten the prompt"
        )
