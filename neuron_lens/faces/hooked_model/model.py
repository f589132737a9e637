"""HookedModel: say what to extract, ablate or patch, and where; no hooks to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.arguments import known_arguments, refuse_unknown, several
from neuron_lens.faces.hooked_model.cache import ActivationCache
from neuron_lens.faces.hooked_model.config import HookedModelConfig
from neuron_lens.faces.hooked_model.extraction_config import ExtractionConfig
from neuron_lens.faces.hooked_model.forward import Forward, gradient_targets
from neuron_lens.faces.hooked_model.inputs import as_tokens
from neuron_lens.faces.hooked_model.not_offered import NotOffered
from neuron_lens.faces.hooked_model.requests import Batch, requests_of
from neuron_lens.faces.hooked_model.user_hooks import UserHook
from neuron_lens.transformer import Transformer

if TYPE_CHECKING:
    import os

    from neuron_lens.faces.hooked_model.stored import StoredCache
    from neuron_lens.interventions import SweepResult

__all__ = ["HookedModel"]

LAST = ("last",)


class HookedModel(NotOffered):
    """A model to which requests are made. The engine's model stays as it is; registered hooks and interventions live here.

    Args:
        model: a loaded `Transformer`, or a configuration that says which to load.
        config: how it was loaded; None for the defaults.
    """

    def __init__(
        self, model: Transformer | HookedModelConfig, config: HookedModelConfig | None = None
    ) -> None:
        if isinstance(model, HookedModelConfig) and config is None:
            config, model = model, _loaded(model)
        if not isinstance(model, Transformer):
            raise RequestError(
                f"HookedModel takes a Transformer or a HookedModelConfig; for names use HookedModel.from_pretrained; got "
                f"{model!r:.60}"
            )
        self.model = model
        self.config = config or HookedModelConfig(model_name=model.config.name or "unnamed")
        self._interventions: list[Any] = []
        self._user_hooks: list[UserHook] = []

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] | HookedModelConfig | Transformer, **options: Any
    ) -> HookedModel:
        """Open a model: a name, path or configuration (with fields of `HookedModelConfig` as options), or a loaded one.

        Raises CheckpointError when it cannot be opened, multimodal ones among them.
        """
        if isinstance(source, Transformer):
            return cls(source, HookedModelConfig(model_name=source.config.name or "unnamed", **options))
        if isinstance(source, HookedModelConfig):
            if options:
                raise RequestError(
                    f"give a HookedModelConfig or its fields, not both; got {', '.join(options)} besides"
                )
            config = source
        else:
            config = HookedModelConfig(model_name=str(source), **options)
        return cls(_loaded(config), config)

    def forward(
        self,
        inputs: Any,
        target_token_positions: Sequence[Any] = LAST,
        pivot_positions: Sequence[Any] | None = None,
        extraction_config: ExtractionConfig | None = None,
        interventions: Iterable[Any] | None = None,
        *,
        split_positions: Sequence[Any] | None = None,
        ablation_queries: Any = None,
        patching_queries: Any = None,
        external_cache: ActivationCache | None = None,
        batch_idx: int | None = None,
        move_to_cpu: bool = False,
        vocabulary_index: Any = None,
        ragged: bool = False,
        **unknown: Any,
    ) -> ActivationCache:
        """Run the model once and keep what was asked for.

        One rule of recording: every recorded value is what leaves its site after all interventions and users' hooks there, given
        here or registered before; it is what the rest of the model reads.

        Args:
            inputs: a text, texts, ids, or a mapping with input_ids and attention_mask; rows may be padded on either side.
            target_token_positions: groups of positions, resolved in each row by itself (`positions.GRAMMAR`).
            pivot_positions: where `inputs-partition-k` cuts; split_positions is the same by its older name.
            interventions: `Intervention`s, or declared ones of `neuron_lens.interventions`.
            ablation_queries, patching_queries: dicts, lists of dicts or data frames; see `queries`.
            external_cache: running means over examples (`avg_…`) are joined into this cache instead of being returned.
            batch_idx: not needed; accepted for compatibility.
            vocabulary_index: for keep_gradient, the token whose last logit is differentiated: an id, or one for each row.
            ragged: rows may have different numbers of positions in a group; every value is then a list with one tensor a row.

        Returns:
            The activations by key, with `logits`, `mapping_index` {group: indices along dimension 1} and
            `token_dict` {group: absolute positions of each row}.

        Raises:
            RequestError: before anything runs, for what does not exist in the model or selects nothing in some row, and for
                unknown arguments.
        """
        refuse_unknown("forward", unknown, FORWARD_ARGUMENTS)
        if external_cache is not None and not isinstance(external_cache, ActivationCache):
            raise RequestError(f"external_cache must be an ActivationCache; got {external_cache!r:.60}")
        batch = self._batch(inputs, pivot_positions, split_positions)
        prepared = self._prepared(
            batch,
            target_token_positions,
            extraction_config,
            interventions=interventions,
            ablation_queries=ablation_queries,
            patching_queries=patching_queries,
            ragged=ragged,
            to_cpu=move_to_cpu,
        )
        targets = None
        if prepared.config.keep_gradient:
            targets = gradient_targets(vocabulary_index, batch.tokens.shape[0], self.model.config.d_vocab)
        elif vocabulary_index is not None:
            raise RequestError(
                "vocabulary_index says which logit is differentiated: it needs keep_gradient=True"
            )
        cache = prepared.run(targets)
        return cache if external_cache is None else _moved_means(cache, external_cache)

    def __call__(self, inputs: Any, *args: Any, **options: Any) -> ActivationCache:
        """The same as `forward`."""
        return self.forward(inputs, *args, **options)

    def predict(
        self, inputs: Any, k: int = 10, strip: bool = True, **options: Any
    ) -> dict[str, float] | list[dict[str, float]]:
        """The k likeliest next tokens after the last selected position: {text: probability}, or a list with one for each row.

        Tokens that look alike once stripped are added up. options: those of `forward`.
        """
        if self.model.tokenizer is None:
            raise RequestError(
                "predict names tokens, and the model has no tokenizer; use forward and its logits"
            )
        if not isinstance(k, int) or not 1 <= k <= self.model.config.d_vocab:
            raise RequestError(f"k must be from 1 to {self.model.config.d_vocab}; got {k!r}")
        logits = self.forward(inputs, **options)["logits"]
        tables = []
        for row in logits:
            top = row[-1].float().softmax(-1).topk(k)
            table: dict[str, float] = {}
            for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                text = self.model.tokenizer.token_str(token)
                text = text.strip() if strip else text
                table[text] = table.get(text, 0.0) + probability
            tables.append(table)
        return tables[0] if len(tables) == 1 else tables

    def generate(
        self,
        inputs: Any,
        generation_config: Mapping[str, Any] | None = None,
        target_token_positions: Sequence[Any] | None = None,
        return_text: bool = False,
        *,
        pivot_positions: Sequence[Any] | None = None,
        split_positions: Sequence[Any] | None = None,
        extraction_config: ExtractionConfig | None = None,
        interventions: Iterable[Any] | None = None,
        ablation_queries: Any = None,
        patching_queries: Any = None,
        **unknown: Any,
    ) -> Any:
        """Continue prompts with interventions at work in every step; positions are those of the prompt.

        Args:
            generation_config: options of `neuron_lens.transformer.sampling.stream`: max_new_tokens, temperature, seed, ….
            target_token_positions: extract at these positions of the prompt; None extracts nothing.
            extraction_config: what to extract there; None for the logits. Logits take one more pass over the prompts, in
                which hooks run too.
            return_text: texts in place of `Generation`s.

        Returns:
            A list with one `Generation` (or text) for each row; with target positions, {"generation_output":
            that, "cache": cache}.
        """
        from neuron_lens.faces.hooked_model.generation import generate

        refuse_unknown("generate", unknown, known_arguments(HookedModel.generate))
        return generate(
            self,
            self._batch(inputs, pivot_positions, split_positions),
            generation_config,
            target_token_positions,
            return_text,
            extraction_config,
            interventions=interventions,
            ablation_queries=ablation_queries,
            patching_queries=patching_queries,
        )

    def extract_cache(
        self,
        dataloader: Iterable[Any],
        target_token_positions: Sequence[Any] = LAST,
        extraction_config: ExtractionConfig | None = None,
        interventions: Iterable[Any] | None = None,
        batch_saver: Callable[[dict[str, Any]], Mapping[str, Any] | None] | None = None,
        move_to_cpu_after_forward: bool = True,
        *,
        stream_to: str | os.PathLike[str] | None = None,
        progress: bool = False,
        register_aggregation: tuple[str, Callable[[Any, Any], Any]] | None = None,
        **forward_options: Any,
    ) -> ActivationCache | StoredCache:
        """Extract over a data set, batch by batch; see `dataset.extract`."""
        from neuron_lens.faces.hooked_model.dataset import extract

        return extract(
            self,
            dataloader,
            target_token_positions,
            extraction_config,
            batch_saver=batch_saver,
            stream_to=stream_to,
            progress=progress,
            aggregation=register_aggregation,
            interventions=interventions,
            move_to_cpu=move_to_cpu_after_forward,
            **forward_options,
        )

    def compute_patching(self, *args: Any, **options: Any) -> ActivationCache:
        """Three passes, base, clean and patched, and how far the patch carries; see `patching.compute_patching`."""
        from neuron_lens.faces.hooked_model.patching import compute_patching

        known = [*known_arguments(compute_patching), *FORWARD_ARGUMENTS]
        refuse_unknown(
            "compute_patching", options, [name for name in known if name not in ("model", "options")]
        )
        return compute_patching(self, *args, **options)

    def sweep(self, inputs: Any, cells: Iterable[Any], metric: Any, **options: Any) -> SweepResult:
        """One metric of many requests, each alone, by the sweep engine; see `patching.sweep_requests`."""
        from neuron_lens.faces.hooked_model.patching import sweep_requests
        from neuron_lens.interventions import sweep

        known = [*known_arguments(sweep_requests), *known_arguments(sweep)]
        refuse_unknown("sweep", options, [name for name in known if name not in ("model", "tokens", "pad")])
        return sweep_requests(self, inputs, cells, metric, **options)

    def register_forward_hook(self, component: str, function: Callable[..., Any]) -> UserHook:
        """Run a function in every forward until the handle's `remove()`; see `UserHook` for components and functions."""
        hook = UserHook(self.model, component, function, self._user_hooks)
        self._user_hooks.append(hook)
        return hook

    def set_hooks(self, hooks: Iterable[Mapping[str, Any]]) -> list[UserHook]:
        """Register several, each {"component": name, "intervention": function}; returns their handles."""
        listed = several("hooks", hooks, "a list of {'component': name, 'intervention': function}")
        for hook in listed:
            if not isinstance(hook, Mapping) or set(hook) != {"component", "intervention"}:
                raise RequestError(
                    f"a hook is {{'component': name, 'intervention': function}}; got {hook!r:.80}"
                )
        made = [
            UserHook(self.model, hook["component"], hook["intervention"], self._user_hooks) for hook in listed
        ]
        self._user_hooks += made
        return made

    def remove_hooks(self, handles: Iterable[UserHook]) -> None:
        """Take registered hooks out. Raises RequestError for one that is gone already."""
        listed = several("handles", handles, "a list of what set_hooks returned")
        for handle in listed:
            if not isinstance(handle, UserHook):
                raise RequestError(
                    f"a handle is what set_hooks or register_forward_hook returned; got {handle!r:.60}"
                )
            handle.remove()

    def register_interventions(self, interventions: Iterable[Any]) -> None:
        """Interventions for every forward until `clean_interventions`; replaces those registered before."""
        self._interventions = requests_of(interventions)

    def clean_interventions(self) -> None:
        """Forget registered interventions."""
        self._interventions = []

    def get_module_from_string(self, component: str) -> nn.Module:
        """A part of the engine's model: `blocks.3.attn`, `blocks[3].mlp`. Raises RequestError when there is none."""
        name = str(component).replace("[", ".").replace("]", "")
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise RequestError(f"the model has no module {component!r}: {error}") from None

    def to_string_tokens(self, ids: Any) -> list[Any]:
        """Each token as text: a list for one row of ids, a list of lists for several."""
        if self.model.tokenizer is None:
            raise RequestError("the model has no tokenizer")
        listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if listed and isinstance(listed[0], list):
            return [self.model.tokenizer.token_strings(row) for row in listed]
        return list(self.model.tokenizer.token_strings(listed))

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.model.tokenizer

    get_text_tokenizer = get_tokenizer

    def get_lm_head(self) -> Tensor:
        """The unembedding, [d_vocab, d_model]."""
        return self.model.unembed.weight

    def get_last_layernorm(self) -> nn.Module | None:
        """The final norm, or None."""
        return self.model.ln_f

    def is_multimodal(self) -> bool:
        """False: models here read text only."""
        return False

    def eval(self) -> HookedModel:
        """Itself: the model is always evaluated, never trained here."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.embed.weight.device

    def _batch(self, inputs: Any, pivots: Sequence[Any] | None, splits: Sequence[Any] | None) -> Batch:
        if pivots is not None and splits is not None:
            raise RequestError("pivot_positions and split_positions are the same: give one of them")
        tokens, pad = as_tokens(inputs, self.model.tokenizer, self.config.padding_side)
        pad = None if pad is None else pad.to(self.device)
        cuts = splits if pivots is None else pivots
        return Batch(tokens.to(self.device), pad, cuts, self.model.tokenizer, self.config.seed)

    def _prepared(
        self,
        batch: Batch,
        positions: Sequence[Any],
        config: ExtractionConfig | None,
        *,
        interventions: Iterable[Any] | None,
        **options: Any,
    ) -> Forward:
        return Forward.prepared(
            self.model,
            batch,
            list(positions) if isinstance(positions, tuple) else positions,
            config,
            interventions=[*self._interventions, *requests_of(interventions)],
            user_hooks=self._user_hooks,
            **options,
        )


FORWARD_ARGUMENTS = known_arguments(HookedModel.forward)


def _loaded(config: HookedModelConfig) -> Transformer:
    model: Transformer = Transformer.load(config.model_name, device=config.device(), dtype=config.torch_dtype)
    return model


def _moved_means(cache: ActivationCache, running: ActivationCache) -> ActivationCache:
    """Running means moved from a cache into the one that collects them."""
    means = ActivationCache(
        {key: value for key, value in cache.items() if key.startswith("avg_") or key == "n_examples"}
    )
    if means.is_empty():
        raise RequestError("external_cache collects means over examples: set avg_over_example=True")
    running.cat(means)
    return ActivationCache({key: value for key, value in cache.items() if key not in means})
