"""A block of a HookedTransformer: its parts, and what people put in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import cast

from torch import Tensor, nn

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer import parts
from neuron_lens.faces.hooked_transformer.names import PointPlace
from neuron_lens.faces.hooked_transformer.translate import Slot
from neuron_lens.faces.hooked_transformer.weight_views import MLP, Attention, Norm, View
from neuron_lens.transformer import Transformer

__all__ = ["Expert", "Experts", "TransformerBlock"]


class Expert(View):
    """One expert's points and weights, in the layout of nn.Linear: `W_in.weight` and `W_gate.weight` [d_mlp, d_model],
    `W_out.weight` [d_model, d_mlp]. Views: editing one in place edits the model.

    Its points see the tokens that use it [token, d_mlp], those whose first choice it is first. `hook_gate` is what the
    activation function reads, `hook_pre` the other branch, `hook_post` their product.
    """

    def __init__(self, engine: Transformer, path: str, number: int, points: Mapping[str, PointPlace]) -> None:
        super().__init__(engine, path, points)
        self._number = number

    @property
    def W_in(self) -> SimpleNamespace:
        """`weight` [d_mlp, d_model]"""
        return SimpleNamespace(weight=self._weight("up")[self._number])

    @property
    def W_gate(self) -> SimpleNamespace:
        """`weight` [d_mlp, d_model]"""
        return SimpleNamespace(weight=self._weight("gate")[self._number])

    @property
    def W_out(self) -> SimpleNamespace:
        """`weight` [d_model, d_mlp]"""
        return SimpleNamespace(weight=self._weight("down")[self._number])

    def forward(self, x: Tensor) -> Tensor:
        """What it makes of tokens [token, d_model], before its weight, with the hooks on its points"""
        return parts.expert_of(self._held[0], self._path, self._number, list(self.slots()), x)


class Experts(View):
    """A mixture of experts: `experts[j]` and the router `W_gate`.

    `hook_expert_weights` is every expert's probability before the choice [batch · pos, expert] (GPT-OSS: its weight after
    it, 0 for those not chosen); `hook_expert_indices` the experts chosen [batch · pos, choice].
    """

    def __init__(self, engine: Transformer, path: str, points: Mapping[str, PointPlace]) -> None:
        super().__init__(engine, path, {n: place for n, place in points.items() if place.expert is None})
        below: dict[int, dict[str, PointPlace]] = {}
        for name, place in points.items():
            if place.expert is not None:
                below.setdefault(place.expert, {})[name.rpartition(".")[2]] = place
        self.experts = nn.ModuleList(Expert(engine, path, number, own) for number, own in below.items())

    def slots(self) -> Iterator[Slot]:
        """Its own points, and those of the experts."""
        yield from super().slots()
        for expert in self.experts:
            yield from cast(Expert, expert).slots()

    @property
    def W_gate(self) -> SimpleNamespace:
        """The router: `W_gate.weight` [expert, d_model]"""
        return SimpleNamespace(weight=self._weight("router.weight"))

    def _refused(self, name: str) -> RequestError:
        return RequestError(f"a mixture of experts has no one {name}: read mlp.experts[j].{name}.weight")

    @property
    def W_in(self) -> Tensor:
        """Raises RequestError: each expert has its own."""
        raise self._refused("W_in")

    @property
    def W_out(self) -> Tensor:
        """Raises RequestError: each expert has its own."""
        raise self._refused("W_out")

    def forward(self, x: Tensor) -> Tensor:
        """The normalised stream [batch, pos, d_model] -> what the experts give"""
        inside = parts.taken_over(self._path)
        return (
            inside(x)
            if inside is not None
            else parts.mlp_of(self._held[0], self._path, list(self.slots()), x)
        )


class TransformerBlock(View):
    """One block: `attn`, `mlp`, `ln1`, `ln2` and, where the model has them, `ln1_post`, `ln2_post`."""

    def __init__(self, engine: Transformer, layer: int = 0, places: Iterable[PointPlace] = ()) -> None:
        below: dict[str, dict[str, PointPlace]] = {}
        for place in places:
            owner, _, point = ("." + place.name if "." not in place.name else place.name).partition(".")
            below.setdefault(owner, {})[point] = place
        super().__init__(engine, f"blocks.{layer}", below.pop("", {}))
        post = engine.config.norm_place == "post"
        norms = {
            "ln1": "ln_attn_out" if post else "ln_attn",
            "ln2": "ln_mlp_out" if post else ("ln_attn" if engine.config.shared_norm else "ln_mlp"),
            "ln1_post": "ln_attn_out",
            "ln2_post": "ln_mlp_out",
        }
        kinds: dict[str, type[View]] = {"attn": Attention, "mlp": MLP}
        self._own: dict[str, View] = {}
        if engine.config.mlp == "experts":
            kinds["mlp"] = Experts
        for owner, points in below.items():
            kind = kinds.get(owner, Norm)
            self._own[owner] = kind(engine, f"blocks.{layer}.{norms.get(owner, owner)}", points)
            setattr(self, owner, self._own[owner])

    def slots(self) -> Iterator[Slot]:
        """Its own points, and those of the parts it was made with."""
        yield from super().slots()
        for part in self._own.values():
            yield from part.slots()

    def replaced(self) -> dict[str, nn.Module]:
        """The MLP by its path, if somebody put another module in its place or gave it another `forward`.

        Raises RequestError for another part that was replaced.
        """
        found: dict[str, nn.Module] = {}
        for name, own in self._own.items():
            now = self._modules[name]
            if now is own and "forward" not in own.__dict__:
                continue
            if name != "mlp" or now is None:
                raise RequestError(
                    f"{self._path}.{name} was replaced by {type(now).__name__}, which is offered for mlp and unembed; "
                    "hook the points before and behind it instead"
                )
            found[own._path] = now
        return found

    def forward(self, resid_pre: Tensor) -> Tensor:
        """The stream entering the block -> the stream leaving it, [batch, pos, d_model]"""
        return parts.block_of(self._held[0], self._path, list(self.slots()), self.replaced(), resid_pre)
