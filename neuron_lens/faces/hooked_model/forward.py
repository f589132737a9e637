"""One forward: positions, interventions and recorders put together, run, and collected into a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.cache import ActivationCache
from neuron_lens.faces.hooked_model.compile import compiled
from neuron_lens.faces.hooked_model.extraction import Extraction
from neuron_lens.faces.hooked_model.extraction_config import ExtractionConfig
from neuron_lens.faces.hooked_model.positions import ResolvedPositions, resolve_positions
from neuron_lens.faces.hooked_model.queries import ablations, patches
from neuron_lens.faces.hooked_model.requests import Batch
from neuron_lens.faces.hooked_model.user_hooks import UserHook
from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions import to_hooks

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["Forward", "gradient_targets"]


@dataclass(frozen=True, eq=False)
class Forward:
    """What one forward is asked for; `tree` and `extraction` are ready to run.

    Hooks run in this order at every site: registered interventions, those of the call, ablation and patching queries, users' own
    hooks, recorders. So a recorded value is what the rest of the model reads, whatever changed it.
    """

    model: Transformer
    batch: Batch
    where: ResolvedPositions
    config: ExtractionConfig
    extraction: Extraction
    tree: TransformerHooks
    may_stop: bool

    @classmethod
    def prepared(
        cls,
        model: Transformer,
        batch: Batch,
        target_token_positions: Sequence[Any],
        config: ExtractionConfig | None,
        *,
        interventions: Iterable[Any] = (),
        ablation_queries: Any = None,
        patching_queries: Any = None,
        user_hooks: Sequence[UserHook] = (),
        ragged: bool = False,
        to_cpu: bool = False,
    ) -> Forward:
        """Resolve and compile everything. Raises RequestError before anything runs."""
        config = ExtractionConfig() if config is None else config
        if not isinstance(config, ExtractionConfig):
            raise RequestError(f"extraction_config must be an ExtractionConfig; got {config!r:.60}")
        where = resolve_positions(target_token_positions, batch.tokens, batch.pad, **batch.options())
        if config.save_logits and not ragged:
            where.require_rectangular()  # logits are never averaged
        rows = None
        if config.attn_pattern_row_positions is not None:
            wanted = list(config.attn_pattern_row_positions)
            rows = resolve_positions(wanted, batch.tokens, batch.pad, **batch.options())
        requests = list(interventions)
        requests += [] if ablation_queries is None else ablations(ablation_queries, model)
        requests += [] if patching_queries is None else patches(patching_queries, model)
        tree = to_hooks(compiled(requests, model, batch), model, tokens=batch.tokens, pad=batch.pad)
        for hook in user_hooks:
            hook.attach(tree)
        extraction = Extraction(model, config, where, rows, ragged=ragged, to_cpu=to_cpu)
        extraction.attach(tree)
        return cls(model, batch, where, config, extraction, tree, may_stop=not user_hooks)

    def run(self, targets: Tensor | None = None) -> ActivationCache:
        """Run the model once. targets: for gradients, the token whose last logit is differentiated, [batch]."""
        if self.config.keep_gradient:
            with torch.enable_grad():
                logits = self._logits()
                assert logits is not None and targets is not None, "checked before the run"
                self.extraction.differentiate(self._last(logits, targets).sum())
        else:
            with torch.no_grad():
                logits = self._logits()
        return self.collected(logits)

    def collected(self, logits: Tensor | None) -> ActivationCache:
        """What was kept, with logits [batch, at least selected, d_vocab] and what describes it."""
        cache = ActivationCache(self.extraction.values())
        if self.config.save_logits and logits is not None:
            selected = logits[:, : self.where.columns.shape[1]]
            cache["logits"] = self.extraction.split(selected.detach())
        if self.config.save_input_ids:
            ids = self.batch.tokens.gather(1, self.where.columns)
            groups = zip(self.where.names, self.where.groups, strict=True)
            cache["input_ids"] = {
                str(name): self._ids(ids[:, group], self.where.mask[:, group]) for name, group in groups
            }
        split = self.extraction.ragged and not self.config.avg
        cache["mapping_index"] = (
            [self.where.row_mapping(row) for row in range(self.where.columns.shape[0])]
            if split
            else self.where.mapping_index(averaged=self.config.avg)
        )
        cache["token_dict"] = self.where.token_dict()
        return cache

    def _ids(self, ids: Tensor, mask: Tensor) -> Any:
        """Ids of one group: a tensor [batch, members], or a list of one a row when rows are ragged."""
        if bool(mask.all()) and not self.extraction.ragged:
            return ids
        return [row[real] for row, real in zip(ids, mask, strict=True)]

    def _logits(self) -> Tensor | None:
        """Logits at the selected columns, then (for gradients) at each row's last; None when the pass may stop before them."""
        tokens, pad = self.batch.tokens, self.batch.pad
        columns = self.where.columns
        if self.config.keep_gradient:
            columns = torch.cat((columns, self._last_columns()), 1)
        elif not self.config.save_logits and self.may_stop:
            self.model(tokens, hooks=self.tree, pad=pad, stop_at_layer=self.extraction.last_layer() + 1)
            return None
        return self.model(tokens, hooks=self.tree, pad=pad, logits_at=columns)

    def _last_columns(self) -> Tensor:
        tokens, pad = self.batch.tokens, self.batch.pad
        if pad is None:
            return torch.full((tokens.shape[0], 1), tokens.shape[1] - 1, device=tokens.device)
        return self.where.starts[:, None] + (~pad).sum(-1, keepdim=True) - 1

    def _last(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits[:, -1].gather(1, targets.to(logits.device)[:, None])


def gradient_targets(vocabulary_index: Any, rows: int, d_vocab: int) -> Tensor:
    """One token for each row, [batch]. Raises RequestError unless there is one, or one a row, of the vocabulary."""
    if vocabulary_index is None:
        raise RequestError(
            "keep_gradient differentiates a logit: give vocabulary_index, a token id or one for each row"
        )
    try:
        targets = torch.as_tensor(vocabulary_index)
    except (TypeError, ValueError, RuntimeError):
        targets = torch.empty(0)
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.numel() not in (1, rows):
        raise RequestError(
            f"vocabulary_index must be a token id or one for each of {rows} rows; got {vocabulary_index!r:.80}"
        )
    targets = targets.reshape(-1).expand(rows)
    if int(targets.min()) < 0 or int(targets.max()) >= d_vocab:
        raise RequestError(
            f"vocabulary_index {vocabulary_index!r:.80} is outside the vocabulary of {d_vocab}"
        )
    return targets
