"""The module tree of a HookedTransformer: the engine, and hook points and weight views in the classic places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.block_view import TransformerBlock
from neuron_lens.faces.hooked_transformer.config import HookedTransformerConfig
from neuron_lens.faces.hooked_transformer.hook_point import HookPoint
from neuron_lens.faces.hooked_transformer.names import PointPlace, absent_names, block_places, end_places
from neuron_lens.faces.hooked_transformer.parts import running_engine, ungrouped
from neuron_lens.faces.hooked_transformer.root_module import HookedRootModule
from neuron_lens.faces.hooked_transformer.state_names import ENGINE, to_classic_state, to_engine_state
from neuron_lens.faces.hooked_transformer.translate import Slot
from neuron_lens.faces.hooked_transformer.weight_views import (
    Embed,
    Norm,
    PosEmbed,
    Unembed,
    View,
)
from neuron_lens.transformer import Transformer

__all__ = ["EngineModule"]


class EngineModule(HookedRootModule):
    """Hook points and weight views over an engine.

    `parameters()` are the engine's; `state_dict()` has the classic names and layouts.
    """

    engine: Transformer
    cfg: HookedTransformerConfig
    blocks: Any  # an nn.ModuleList of TransformerBlock; torch types its entries too broadly

    def _build(self, engine: Transformer, cfg: HookedTransformerConfig) -> None:
        self.engine, self.cfg = engine, cfg.settled()
        if cfg.use_hook_tokens:
            self.hook_tokens = HookPoint()
        config = engine.config
        self.embed = Embed(engine, "")
        self.hook_embed = HookPoint()
        if config.position == "learned":
            self.pos_embed = PosEmbed(engine, "")
            self.hook_pos_embed = HookPoint()
        rows = [block_places(config, layer) for layer in range(config.n_layers)]
        ends: dict[str, dict[str, PointPlace]] = {}
        for place in end_places(config):
            owner, _, point = place.name.rpartition(".")
            ends.setdefault(owner, {})[point] = place
        self.blocks = nn.ModuleList(
            TransformerBlock(engine, layer, places) for layer, places in enumerate(rows)
        )
        if engine.ln_f is not None:
            self.ln_final = Norm(engine, "ln_f", ends["ln_final"])
        self.unembed = Unembed(engine, "", ends["unembed"])
        self._slots = [Slot(self, name, place) for name, place in ends[""].items()]
        self._own_ends: dict[str, View] = {
            name: module for name, module in self.named_children() if isinstance(module, View)
        }
        for view in [*self._own_blocks(), *self._own_ends.values()]:
            self._slots += view.slots()
        self._places = {slot.place.full_name: slot.place for slot in self._slots}
        self._absent = absent_names(config)
        self.setup()
        if cfg.use_hook_tokens:
            self.hook_tokens.axes = ("batch", "pos")
        self.register_state_dict_post_hook(to_classic_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(to_engine_state)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.cfg = self.cfg.settled()  # a copy of a configuration is free

    def setup(self) -> None:
        """Name every hook point, also those of modules that were put in since."""
        super().setup()
        for owner, name, place in self._slots:
            point = owner._modules[name]
            if isinstance(point, HookPoint):
                point.axes = place.axes

    def _own_blocks(self) -> list[TransformerBlock]:
        return cast(list[TransformerBlock], list(self.blocks))

    def _running_engine(self) -> Transformer:
        """The engine; or a shallow copy of it with the modules that replace some of its parts."""
        replaced: dict[str, nn.Module] = {}
        for block in self._own_blocks():
            replaced |= block.replaced()
        for name, own in self._own_ends.items():
            now = self._modules[name]
            if now is own and "forward" not in own.__dict__:
                continue
            if name != "unembed" or now is None:
                raise RequestError(
                    f"{name} was replaced by {type(now).__name__}, which is offered for mlp and unembed; hook the "
                    "points before and behind it instead"
                )
            replaced["unembed"] = now
        engine = self.engine
        if self.cfg.ungroup_grouped_query_attention and engine.config.n_kv_heads != engine.config.n_heads:
            engine = ungrouped(engine)
        cap, config = self.cfg.output_logits_soft_cap, None
        if (cap if cap > 0 else None) != engine.config.logit_softcap:
            config = engine.config.model_copy(update={"logit_softcap": cap if cap > 0 else None})
        return running_engine(engine, replaced, config) if replaced or config else engine

    def _hookable_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in super()._hookable_modules():
            if name != "engine" and not name.startswith(ENGINE):
                yield name, module

    def _closed_names(self) -> Iterable[str]:
        flags = {
            place.flag for place in self._places.values() if place.flag and not getattr(self.cfg, place.flag)
        }
        return [name for name, place in self._places.items() if place.flag in flags]

    def _absent_names(self) -> dict[str, str]:
        return self._absent

    @property
    def ln1_is_folded(self) -> bool:
        """Whether the norms before linear maps have weight 1 and bias 0 because they were folded."""
        return (self.cfg.normalization_type or "").endswith("Pre")

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether full caches hold `attn.hook_result`. A hook on it works either way."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether full caches hold the per-head inputs of queries, keys and values. Hooks on them work either way."""
        if use_split_qkv_input and self.cfg.use_attn_in:
            raise RequestError(
                "use_split_qkv_input and use_attn_in exclude each other: set_use_attn_in(False) first"
            )
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether full caches hold `hook_mlp_in`. A hook on it works either way."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether full caches hold `hook_attn_in`. A hook on it works either way."""
        if use_attn_in and self.cfg.use_split_qkv_input:
            raise RequestError(
                "use_attn_in and use_split_qkv_input exclude each other: set_use_split_qkv_input(False) first"
            )
        if use_attn_in and self.engine.config.n_kv_heads != self.engine.config.n_heads:
            raise RequestError(
                "several heads share keys and values here: use set_use_split_qkv_input instead of attn_in"
            )
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Whether keys and values have an entry for every head, where several heads share them.

        True repeats them before their hooks: `hook_k`, `hook_v` and `hook_v_input` are [batch, pos, head, …], and a hook on
        one head's entry changes that head only. A key-value cache is of one kind or the other.
        """
        if ungroup_grouped_query_attention and self.engine.config.n_kv_heads != self.engine.config.n_heads:
            ungrouped(self.engine)  # raises now what the first forward would
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.engine.embed.weight.device

    def to(self, *args: Any, print_details: bool = True, **kwargs: Any) -> Self:
        """As `nn.Module.to`; keeps `cfg.device` and `cfg.dtype` true. print_details: accepted, prints nothing."""
        moved: Self = super().to(*args, **kwargs)
        self.cfg.__dict__.update(device=str(self.device), dtype=self.engine.embed.weight.dtype)
        return moved

    def move_model_modules_to_device(self) -> None:
        """Move to `cfg.device`."""
        self.to(self.cfg.device)

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Move to a CUDA device."""
        return self.to(
            torch.device("cuda")
            if device is None
            else torch.device("cuda", device)
            if isinstance(device, int)
            else device
        )

    def cpu(self) -> Self:
        """Move to the CPU."""
        return self.to("cpu")

    def mps(self) -> Self:
        """Move to Apple's GPU."""
        return self.to("mps")

    def _tokens_hooked(self, tokens: Tensor) -> Tensor:
        return self.hook_tokens(tokens) if self.cfg.use_hook_tokens else tokens
