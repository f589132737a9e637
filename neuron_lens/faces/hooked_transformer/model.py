"""HookedTransformer: the classic interface over the engine."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor

from neuron_lens.errors import CheckpointError, ConfigError, RequestError
from neuron_lens.faces.hooked_transformer.config import HookedTransformerConfig, classic_config, engine_config
from neuron_lens.faces.hooked_transformer.initialise import initialise
from neuron_lens.faces.hooked_transformer.weight_steps import WeightSteps
from neuron_lens.transformer import Transformer
from neuron_lens.weights import Processing, process

__all__ = ["HookedTransformer"]


class HookedTransformer(WeightSteps):
    """A language model whose activations have names that hooks can be put on.

    Build one from a configuration (random weights), or with `from_pretrained`. The model holds the hooks; each
    forward hands the engine those that there are, so without hooks it is as fast as the engine itself.

    Args:
        cfg: a `HookedTransformerConfig`, or a dictionary of its fields.
        tokenizer: any known kind of tokenizer, or a name or path of one.
        move_to_device: put the weights on `cfg.device`.
        default_padding_side: where texts are padded: "right", or "left".
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: Literal["left", "right"] = "right",
    ) -> None:
        super().__init__()
        cfg = HookedTransformerConfig.unwrap(cfg)
        given: Transformer | None = cfg.__dict__.pop("_engine", None)
        if given is not None:  # from_engine: a subclass's __init__ runs, and the weights are there
            self._assemble(given, cfg, tokenizer, default_padding_side)
            return
        vocabulary = getattr(tokenizer, "vocab_size", None)
        if cfg.d_vocab == -1 and vocabulary is not None:
            cfg.d_vocab = cfg.d_vocab_out = int(vocabulary)
        engine = Transformer(engine_config(cfg), seed=None)
        if cfg.init_weights:
            initialise(engine, cfg.init_mode, cfg.initializer_range, cfg.seed)
        engine.to(dtype=cfg.dtype, device=cfg.device if move_to_device else None)
        self._assemble(engine, cfg, tokenizer, default_padding_side)

    def _assemble(
        self,
        engine: Transformer,
        cfg: HookedTransformerConfig,
        tokenizer: Any,
        padding_side: Literal["left", "right"],
    ) -> None:
        self.padding_side = padding_side
        self._build(engine, cfg)
        self.set_tokenizer(tokenizer)

    @classmethod
    def from_engine(
        cls,
        engine: Transformer,
        *,
        tokenizer: Any = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: Literal["left", "right"] = "right",
        folded: bool = False,
        **known: Any,
    ) -> Self:
        """Around an engine's model, which is used and not copied.

        folded: its norms before linear maps were folded. known: fields of the configuration that the engine does not know.
        """
        weight = engine.embed.weight
        cfg = classic_config(engine.config, device=weight.device, dtype=weight.dtype, **known)
        if folded and cfg.normalization_type is not None:
            cfg.normalization_type += "Pre"
        if default_prepend_bos is not None:
            cfg.default_prepend_bos = default_prepend_bos
        cfg.__dict__["_engine"] = engine
        return cls(
            cfg,
            engine.tokenizer if tokenizer is None else tokenizer,
            move_to_device=False,
            default_padding_side=default_padding_side,
        )

    @classmethod
    def from_pretrained(
        cls,
        model_name: Any,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        checkpoint_label: str | None = None,
        hf_model: Any = None,
        device: str | torch.device | None = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        move_to_device: bool = True,
        fold_value_biases: bool = True,
        default_prepend_bos: bool | None = None,
        default_padding_side: Literal["left", "right"] = "right",
        dtype: torch.dtype | str = "float32",
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        revision: str | None = None,
        **unknown: Any,
    ) -> Self:
        """Load a checkpoint, with its weights processed.

        Args:
            model_name: a name, a folder, or a remote path; with `hf_model`, only what the model is called.
            fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices: the
                processing; a step that would change this model's function is left out, and logged.
            hf_model: a model of transformers, whose weights are copied.
            tokenizer: instead of the checkpoint's own.
            first_n_layers: keep only these many blocks.
            n_ctx: a context other than the checkpoint's (for models without a table of positions).
            revision: branch, tag or commit on the hub; `checkpoint_label` names one, too.

        Raises:
            CheckpointError: no such checkpoint, or one of parts this library does not have.
            RequestError: options that it does not have.
        """
        from neuron_lens.loading import load  # heavy; needed only here

        if unknown:
            raise RequestError(f"from_pretrained has no option {sorted(unknown)}")
        if n_devices != 1:
            raise RequestError("n_devices must be 1: several devices are not offered")
        if checkpoint_index is not None or checkpoint_value is not None:
            revision = _training_revision(str(model_name), checkpoint_index, checkpoint_value)
        source = model_name if hf_model is None else hf_model
        wanted = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        place = "cpu" if device is None or not move_to_device else device
        engine = load(source, device=place, dtype=wanted, revision=checkpoint_label or revision)
        engine = _cut(engine, first_n_layers, n_ctx)
        steps = Processing(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        if hf_model is not None and tokenizer is None and isinstance(model_name, str):
            tokenizer = engine.tokenizer
        known: dict[str, Any] = {
            "from_checkpoint": revision is not None,
            "checkpoint_index": checkpoint_index,
        }
        known |= {
            "checkpoint_value": checkpoint_value,
            "tokenizer_name": str(model_name) if engine.tokenizer else None,
        }
        known |= {
            "model_name": str(model_name).rpartition("/")[2],
            "original_architecture": type(hf_model).__name__ if hf_model is not None else None,
        }
        return cls.from_engine(
            process(engine, steps),
            tokenizer=tokenizer,
            default_prepend_bos=default_prepend_bos,
            default_padding_side=default_padding_side,
            folded=fold_ln,
            **known,
        )

    @classmethod
    def from_pretrained_no_processing(cls, model_name: Any, **options: Any) -> Self:
        """Load a checkpoint as it is. Options as in `from_pretrained`."""
        steps = (
            "fold_ln",
            "center_writing_weights",
            "center_unembed",
            "refactor_factored_attn_matrices",
            "fold_value_biases",
        )
        return cls.from_pretrained(model_name, **{**dict.fromkeys(steps, False), **options})

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = True,
    ) -> None:
        """Process the weights of this model; hooks stay. A step that would change its function is left out."""
        steps = Processing(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        self._use_engine(process(self.engine, steps), folded=fold_ln)

    def load_and_process_state_dict(self, state_dict: dict[str, Tensor], **steps: bool) -> None:
        """Load a classic state dict, then `process_weights_` with these options."""
        self.load_state_dict(state_dict, strict=False)
        self.process_weights_(**steps)

    def init_weights(self) -> None:
        """Draw all weights anew, by `cfg.init_mode` and `cfg.seed`."""
        initialise(self.engine, self.cfg.init_mode, self.cfg.initializer_range, self.cfg.seed)


def _cut(engine: Transformer, first_n_layers: int | None, n_ctx: int | None) -> Transformer:
    """The engine with fewer blocks or another context."""
    config = engine.config
    changes: dict[str, Any] = {}
    if first_n_layers is not None:
        if not 0 <= first_n_layers <= config.n_layers:
            raise RequestError(f"first_n_layers must be 0 to {config.n_layers}; got {first_n_layers}")
        changes |= {"n_layers": first_n_layers, "windows": config.windows[:first_n_layers]}
    if n_ctx is not None:
        if config.position == "learned" and n_ctx != config.n_ctx:
            raise ConfigError(
                f"n_ctx is {config.n_ctx}, the rows of the table of positions; {n_ctx} was asked for"
            )
        changes |= {"n_ctx": n_ctx}
    if not changes:
        return engine
    from neuron_lens.weights.tensors import Weights

    weights = Weights.of(engine)
    dropped = [
        f"blocks.{layer}." for layer in range(changes.get("n_layers", config.n_layers), config.n_layers)
    ]
    kept = {name: t for name, t in weights.tensors.items() if not name.startswith(tuple(dropped))}
    return Weights(weights.config, kept).changed({}, **changes).build(engine)


# Pythia's training checkpoints: the first eleven powers of two, then every thousandth step.
_PYTHIA_STEPS = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]


def _training_revision(name: str, index: int | None, value: int | None) -> str:
    if "pythia" not in name.lower():
        raise CheckpointError(
            f"which revisions are training checkpoints of {name} is not known: give revision= instead"
        )
    if index is not None:
        value = _PYTHIA_STEPS[index]
    if value not in _PYTHIA_STEPS:
        raise CheckpointError(
            f"{name} has no checkpoint of step {value}; steps are powers of two to 512, then thousands"
        )
    return f"step{value}"
