"""Path patching: the effect of some senders on the metric through chosen paths to some receivers.

What the senders add to the residual stream in a source run differs from the base run. That difference travels to the
receivers: directly, with everything between held at the base run (Goldowsky-Dill et al. 2023, arXiv 2304.05969), or
also through what lies between, where `through` lets it: through MLPs with all attention held (Wang et al. 2022,
arXiv 2211.00593), or through everything. Other receivers are always held, so that every path is counted once: with
all that reads as receivers, the effect is that of patching the senders themselves. Receivers then read the stream of
the run plus what reached them, and everything behind them runs as it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions.apply import capture, to_hooks
from neuron_lens.interventions.circuits.nodes import GraphShape, Node
from neuron_lens.interventions.circuits.reads import MLP_IN, STREAM_OUT, ReadsMore, read_site
from neuron_lens.interventions.circuits.senders import sender_outputs
from neuron_lens.interventions.grid import Grid
from neuron_lens.interventions.metrics import Metric
from neuron_lens.interventions.patch import Patch
from neuron_lens.interventions.places import Frozen
from neuron_lens.interventions.sweep import sweep
from neuron_lens.interventions.sweep_result import SweepResult
from neuron_lens.interventions.tensors import Activations

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer, TransformerConfig

__all__ = [
    "Receiver",
    "Sender",
    "Through",
    "head_difference",
    "patch_paths",
    "path_patch",
    "sender_differences",
]

AnyMetric = Metric | Callable[[Tensor], Any]
Through = Literal["nothing", "mlps", "everything"]
STREAM = "resid.torso.pre_attn"
WRITES = {
    "embedding": "resid.post_emb",
    "head": "resid.torso.delta_attn",
    "mlp": "resid.torso.delta_mlp",
}


class Sender(Frozen):
    """What writes to the stream: the embedding, a head of a layer, or a layer's MLP."""

    part: Literal["embedding", "head", "mlp"]
    layer: int | None = None
    head: int | None = None

    def written_before(self, layer: int, *, behind_attention: bool) -> bool:
        """Whether what it writes has reached the stream entering a layer, or its MLP."""
        if self.part == "embedding":
            return True
        assert self.layer is not None, "checked when used"
        return self.layer < layer or (self.layer == layer and behind_attention and self.part == "head")


class Receiver(Frozen):
    """What reads the stream: a head's queries, keys or values (head None: all heads'), a layer's MLP, or the logits."""

    part: Literal["q", "k", "v", "mlp", "logits"]
    layer: int | None = None
    head: int | None = None


def path_patch(
    model: Transformer,
    tokens: Tensor,
    source_tokens: Tensor,
    senders: Sequence[Sender],
    receivers: Sequence[Receiver] | Iterable[Sequence[Receiver]],
    metric: AnyMetric | Mapping[str, AnyMetric],
    *,
    through: Through = "nothing",
    **options: Any,
) -> SweepResult:
    """The metric when `senders` reach each set of receivers as in the source run, through the paths that are let.

    What a head adds where a norm stands behind attention is its output through that norm with the divisor of its run held.

    Args:
        tokens, source_tokens: [batch, pos], of equal shape; with `pad` among the options, both are padded so.
        senders: all of them together.
        receivers: one set of receivers, or several, each a cell of the result.
        through: what lies between passes the difference on: "nothing" (direct paths only), "mlps" (attention is held at
            the base run), "everything" (only the other receivers are held).
        options: those of `sweep`.

    Raises:
        RequestError: parts that do not exist, prompts of different shape, receivers that no sender precedes.
    """
    differences = sender_differences(model, tokens, source_tokens, senders, options.get("pad"))
    return patch_paths(model, tokens, differences, receivers, metric, through=through, **options)


def patch_paths(
    model: Transformer,
    tokens: Tensor,
    differences: Mapping[Sender, Tensor],
    receivers: Sequence[Receiver] | Iterable[Sequence[Receiver]],
    metric: AnyMetric | Mapping[str, AnyMetric],
    *,
    through: Through = "nothing",
    **options: Any,
) -> SweepResult:
    """`path_patch` with given differences of what senders add to the stream, [batch, pos, d_model] each."""
    config = model.config
    sets = _receiver_sets(receivers)
    if through not in get_args(Through):
        raise RequestError(f"through {through!r}: expected one of {', '.join(map(repr, get_args(Through)))}")
    _check_receivers(config, list(differences), sets)
    base: Activations | None = None
    if through != "nothing":
        sites = [STREAM, STREAM_OUT, WRITES["head"]]
        sites += [] if config.mlp == "none" else [MLP_IN, WRITES["mlp"]]
        base = capture(model, tokens, sites, pad=options.get("pad"))
    cells = []
    for one in sets:
        reached: Callable[[Receiver], Tensor] = _Direct(config, differences)
        if base is not None:
            reached = _Recorded(model, tokens, differences, one, base, through, options.get("pad"))
        tree = TransformerHooks()
        for receiver in one:
            site, layer, heads = _read_at(config, receiver)
            hook = ReadsMore(reached(receiver), heads)
            tree.append_to_path(f"{site}.fwd", AtLayers(layer).append(hook))
        cells.append(tree)
    return sweep(model, tokens, Grid({"cell": tuple(range(len(cells)))}, tuple(cells)), metric, **options)


def sender_differences(
    model: Transformer,
    tokens: Tensor,
    source_tokens: Tensor,
    senders: Sequence[Sender],
    pad: Tensor | None = None,
) -> dict[Sender, Tensor]:
    """What each sender adds to the stream in the source run less what it adds in the run of `tokens`.

    Raises RequestError for senders that do not exist and prompts of different shape.
    """
    check_senders(model.config, senders)
    if tokens.shape != source_tokens.shape:
        raise RequestError(
            f"the prompts are {list(tokens.shape)} and the source's {list(source_tokens.shape)}; they must align"
        )
    index = {node.name: at for at, node in enumerate(GraphShape.of(model.config).senders)}
    chosen = [index[Node(**dict(sender)).name] for sender in senders]
    ours, theirs = (sender_outputs(model, one, pad=pad)[chosen] for one in (tokens, source_tokens))
    return dict(zip(senders, theirs - ours, strict=True))


def head_difference(
    model: Transformer,
    tokens: Tensor,
    source: Mapping[Any, Tensor],
    sender: Sender,
    pad: Tensor | None = None,
) -> Tensor:
    """What a head adds with its mixed values (`attn.v_out`) from a source, less what it adds to a run. [batch, pos, d_model]

    Raises RequestError where a norm stands behind attention: the source's whole run would be needed.
    """
    check_senders(model.config, [sender])
    if model.config.norm_place != "pre" and model.config.norm != "none":
        raise RequestError(
            "a norm stands behind attention: what a head adds depends on its whole run; give the source's tokens"
        )
    patch = Patch(site="attn.v_out", layers=sender.layer, heads=sender.head, source=source)
    site, written = "attn.result", []
    for hooks in (to_hooks(patch, model), None):
        run = capture(model, tokens, site, layers=sender.layer, hooks=hooks, pad=pad)
        written.append(run[site, sender.layer][:, :, sender.head])
    return (written[0] - written[1]) * model.config.residual_scale


def _receiver_sets(receivers: Sequence[Receiver] | Iterable[Sequence[Receiver]]) -> list[list[Receiver]]:
    listed: list[Any] = list(receivers)
    if listed and all(isinstance(one, Receiver) for one in listed):
        return [listed]
    return [list(one) for one in listed]


def _check_part(config: TransformerConfig, one: Sender | Receiver) -> None:
    whole = one.part in ("embedding", "logits")
    heads = config.n_kv_heads if one.part in ("k", "v") else config.n_heads
    if (one.layer is None) != whole or (one.layer is not None and not 0 <= one.layer < config.n_layers):
        raise RequestError(
            f"{one!r}: {one.part} {'has no layer' if whole else f'needs a layer of {config.n_layers}'}"
        )
    has_head = one.part in ("head", "q", "k", "v")
    if (one.part == "head" and one.head is None) or (
        one.head is not None and not (has_head and 0 <= one.head < heads)
    ):
        raise RequestError(f"{one!r}: {one.part} needs a head of {heads}, and only heads have one")
    if one.part == "mlp" and config.mlp == "none":
        raise RequestError(f"{one!r}: the model has no MLP")


def check_senders(config: TransformerConfig, senders: Sequence[Sender]) -> None:
    if not senders or len(set(senders)) != len(senders):
        raise RequestError("path patching needs at least one sender, each named once")
    for one in senders:
        _check_part(config, one)


def _check_receivers(
    config: TransformerConfig, senders: Sequence[Sender], sets: list[list[Receiver]]
) -> None:
    if not sets or not all(sets):
        raise RequestError("path patching needs at least one receiver")
    for receiver in (one for receivers in sets for one in receivers):
        _check_part(config, receiver)
        if not any(_reaches(config, sender, receiver) for sender in senders):
            raise RequestError(
                f"{receiver!r}: no sender writes to the stream before it reads; there is no path"
            )


def _reaches(config: TransformerConfig, sender: Sender, receiver: Receiver) -> bool:
    """Whether a sender has written when a receiver reads."""
    layer = config.n_layers if receiver.layer is None else receiver.layer
    return sender.written_before(layer, behind_attention=receiver.part == "mlp" and not config.parallel)


def _read_at(config: TransformerConfig, receiver: Receiver) -> tuple[str, int, list[int] | None]:
    """The site that holds what a receiver reads, its layer, and the heads there; None where there are none."""
    site, layer = read_site(receiver.part, receiver.layer, config.n_layers)
    if receiver.part in ("mlp", "logits"):
        return site, layer, None
    every = range(config.n_heads if receiver.part == "q" else config.n_kv_heads)
    return site, layer, list(every) if receiver.head is None else [receiver.head]


class _Direct:
    """What reaches a receiver directly: the sum of what the senders before it write differently."""

    def __init__(self, config: TransformerConfig, differences: Mapping[Sender, Tensor]) -> None:
        self.config, self.differences = config, differences

    def __call__(self, receiver: Receiver) -> Tensor:
        """[batch, pos, d_model]"""
        some = [
            value for sender, value in self.differences.items() if _reaches(self.config, sender, receiver)
        ]
        return torch.stack(some).sum(0)


class _Recorded:
    """What reaches a receiver in a run with the senders' differences, in which parts and other receivers are held."""

    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,
        differences: Mapping[Sender, Tensor],
        receivers: Sequence[Receiver],
        base: Activations,
        through: Through,
        pad: Tensor | None,
    ) -> None:
        self.config, self.base = model.config, base
        tree = TransformerHooks()
        for receiver in receivers:
            site, layer, heads = _read_at(model.config, receiver)
            if site != STREAM_OUT:
                read = base[MLP_IN if site == MLP_IN else STREAM, layer]
                tree.append_to_path(f"{site}.fwd", AtLayers(layer).append(_Held(read, heads)))
        if through == "mlps":
            for layer in range(model.config.n_layers):
                held = _Held(base[WRITES["head"], layer], None)
                tree.append_to_path(f"{WRITES['head']}.fwd", AtLayers(layer).append(held))
        for sender, difference in differences.items():
            plus = ReadsMore(difference, None)
            placed = plus if sender.layer is None else AtLayers(sender.layer).append(plus)
            tree.append_to_path(f"{WRITES[sender.part]}.fwd2", placed)
        # MLPs that are receivers are held at mlp_in: what they would read is the stream before it
        self.before_mlp = STREAM if model.config.parallel else "resid.torso.post_attn"
        self.run = capture(model, tokens, {STREAM, STREAM_OUT, self.before_mlp}, hooks=tree, pad=pad)

    def __call__(self, receiver: Receiver) -> Tensor:
        """[batch, pos, d_model]"""
        if receiver.layer is None:
            last = self.config.n_layers - 1
            return self.run[STREAM_OUT, last] - self.base[STREAM_OUT, last]
        if receiver.part == "mlp":
            return self.run[self.before_mlp, receiver.layer] - self.base[MLP_IN, receiver.layer]
        return self.run[STREAM, receiver.layer] - self.base[STREAM, receiver.layer]


class _Held:
    """What a site held in the base run; at some heads [batch, pos, head, d_model] the same for each."""

    def __init__(self, value: Tensor, heads: list[int] | None) -> None:
        self.value, self.heads = value, heads

    def __call__(self, x: Tensor) -> Tensor:
        if self.heads is None:
            return self.value
        held = x.clone()
        held[:, :, self.heads] = self.value[:, :, None]
        return held
