"""The training loop: from a stream of activations to an autoencoder, in steps that can be interrupted.

    stream -> batch -> scale -> step (`Optimisation`) -> … -> scale folded in, SAELens folder

A checkpoint holds weights, optimiser, counters and the step; the stream is taken up by its position. So an
interrupted run continues as if it had not been: on the same machine to the bit.

Activations come from the model as it reads the text, or from a store of them (`harvest.dense`): in the same order, and
the same but for rounding, of the batches the model read them in (float32 stores) and of the store's dtype (float16).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from neuron_lens.autoencoder_training.checkpoint import read_checkpoint, write_checkpoint
from neuron_lens.autoencoder_training.optimisation import Optimisation
from neuron_lens.autoencoder_training.settings import TrainingSettings
from neuron_lens.autoencoder_training.stored import stored_stream
from neuron_lens.autoencoder_training.stream import ActivationStream
from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Provenance, Site, save_autoencoder
from neuron_lens.autoencoders.folding import fold_scale
from neuron_lens.files.atomic import write_json_atomic
from neuron_lens.harvest.corpus import Corpus
from neuron_lens.harvest.run import fitting_shape, model_fingerprint

if TYPE_CHECKING:
    from neuron_lens.harvest.dense import StoredActivations
    from neuron_lens.transformer import Transformer

__all__ = ["Trainer", "train_autoencoder"]

_CHECKPOINT = "checkpoint.pt"
_CURVE = "training.json"


def train_autoencoder(
    model: Transformer,
    corpus: Corpus | StoredActivations,
    settings: TrainingSettings,
    folder: str | Path,
    *,
    progress: bool = True,
    checkpoint_every: int = 200,
) -> Autoencoder:
    """Train an autoencoder on a site of a model, or go on with an interrupted run of the same settings.

    Args:
        corpus: text, or the activations of this model on its training part, stored (`store_activations` with
            split="train" and the seed of the settings).
        folder: gets `checkpoint.pt` and `training.json` (settings and the curve) on the way, and at the end
            the autoencoder, in SAELens' format (a top-k transcoder in circuit-tracer's).
        progress: show a bar with loss, L0, variance explained and the share of dead latents.
        checkpoint_every: steps; how often changes nothing in the result.

    Returns:
        Autoencoder: for activations as the model gives them; the scale of training is folded in.

    Raises:
        RequestError: a site or layer the model does not have, too little text, a checkpoint of another run in the folder,
            or stored activations of another model or of other rows.
        CheckpointError: the checkpoint is damaged.
    """
    trainer = Trainer(model, corpus, settings, folder)
    trainer.run(progress=progress, checkpoint_every=checkpoint_every)
    return trainer.finish()


class Trainer:
    """One training run. `run` may be called again and again until `step` is `settings.n_steps`."""

    def __init__(
        self,
        model: Transformer,
        corpus: Corpus | StoredActivations,
        settings: TrainingSettings,
        folder: str | Path,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, Path(folder)
        self.key = {"settings": settings.model_dump(mode="json"), "model": model_fingerprint(model)}
        if isinstance(corpus, Corpus):
            self.stream = _live_stream(model, corpus, settings)
            self.key["corpus"], self.corpus_name = corpus.fingerprint, corpus.name
        else:
            self.stream = stored_stream(model, corpus, settings)
            own = corpus.manifest["key"]
            self.key |= {"corpus": own["corpus"], "stored": own["dtype"]}
            self.corpus_name = str(corpus.folder)
        self.curve: list[dict[str, float]] = []
        saved = read_checkpoint(self.folder / _CHECKPOINT, self.key)
        if saved is None:
            self._begin()
        else:
            self._continue(saved)

    @property
    def autoencoder(self) -> Autoencoder:
        """The weights in training, for scaled activations."""
        return self.optimisation.autoencoder

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.optimisation.step

    def run(self, *, steps: int | None = None, progress: bool = True, checkpoint_every: int = 200) -> None:
        """Train to the end, or for so many steps; a checkpoint is written at the end of it too."""
        last = self.settings.n_steps if steps is None else min(self.step + steps, self.settings.n_steps)
        batches: Iterator[Tensor] = self.stream.batches(self.step) if self.step < last else iter(())
        with tqdm(
            initial=self.step, total=self.settings.n_steps, desc="training", unit="step", disable=not progress
        ) as bar:
            while self.step < last:
                facts = self._one_step(next(batches))
                bar.update()
                bar.set_postfix_str(
                    f"loss {facts['loss']:.3f}, L0 {facts['l0']:.1f}, variance explained "
                    f"{facts['variance_explained']:.3f}, dead {facts['dead_share']:.1%}",
                    refresh=False,
                )
                if self.step % checkpoint_every == 0 or self.step == last:
                    self._save()

    def finish(self) -> Autoencoder:
        """The autoencoder as it is now, for unscaled activations; also written to the folder."""
        weights = {name: tensor.detach().clone() for name, tensor in self.autoencoder.state_dict().items()}
        if "W_skip" in weights:  # it reads what is scaled too
            weights["W_skip"] *= self.scale / self.scale_out
        config, weights = fold_scale(self.autoencoder.config, weights, self.scale, self.scale_out)
        finished = Autoencoder(config, device=self.autoencoder.W_dec.device)
        finished.load_state_dict(weights)
        save_autoencoder(finished, self.folder)
        return finished.eval().requires_grad_(False)

    def _begin(self) -> None:
        """Estimate scale and variance from the first buffer, and make the weights."""
        device = self.model.embed.weight.device
        read, predicted = (part.to(device).float() for part in self.stream.parted(self.stream.buffer(0)))
        self.scale, self.scale_out = _scale(read), _scale(predicted)
        read, predicted = read * self.scale, predicted * self.scale_out
        self.variance = float((predicted - predicted.mean(0)).square().sum(-1).mean())
        self.optimisation = self._build(read.shape[-1], predicted.shape[-1], read.device)
        with torch.no_grad():
            self.autoencoder.b_dec.copy_(predicted.mean(0))
            if self.settings.target is not None and self.autoencoder.b_enc is not None:
                self.autoencoder.b_enc.copy_(-read.mean(0) @ self.autoencoder.W_enc)
        self.optimisation.prepare()

    def _continue(self, saved: dict[str, Any]) -> None:
        self.scale, self.scale_out = saved["scale"], saved["scale_out"]
        self.variance, self.curve = saved["variance"], saved["curve"]
        W_enc, W_dec = saved["autoencoder"]["W_enc"], saved["autoencoder"]["W_dec"]
        self.optimisation = self._build(len(W_enc), W_dec.shape[-1], self.model.embed.weight.device)
        self.optimisation.restore(saved)

    def _build(self, d_in: int, d_out: int, device: torch.device) -> Optimisation:
        settings = self.settings
        site = Site(path=settings.site, layer=settings.layer)
        path_out, layer_out = settings.target or (settings.site, settings.layer)
        begins = bool(self.model.tokenizer.adds_bos)  # every row begins with that token
        config = AutoencoderConfig(
            d_in=d_in,
            d_latent=settings.d_latent,
            d_out=d_out,
            activation=settings.activation,
            k=settings.k,
            group_sizes=settings.group_sizes,
            input_bias="decoder_bias" if settings.target is None else "none",
            has_skip=settings.skip,
            flatten_heads=settings.site in _HEADED and d_in != self.model.config.d_head,
            site_in=site,
            site_out=Site(path=path_out, layer=layer_out),
            model_name=self.model.config.name or None,
            context_size=fitting_shape(self.model).row_length + begins,
            prepend_bos=begins,
            provenance=Provenance(format="neuron_lens", path=str(self.folder), source_config=self.key),
        )
        generator = torch.Generator().manual_seed(settings.seed)
        autoencoder = Autoencoder(config, generator=generator).to(device)
        return Optimisation(autoencoder, settings, self.variance)

    def _one_step(self, batch: Tensor) -> dict[str, float]:
        device = self.autoencoder.W_dec.device
        read, predicted = self.stream.parted(batch.to(device=device, dtype=torch.float32))
        x = read * self.scale
        facts = self.optimisation(x, x if self.settings.target is None else predicted * self.scale_out)
        if self.step % max(1, self.settings.n_steps // 200) == 0 or self.step == self.settings.n_steps:
            self.curve.append(facts)
        return facts

    def _save(self) -> None:
        held = {
            "key": json.dumps(self.key, sort_keys=True),
            **self.optimisation.state(),
            "scale": self.scale,
            "scale_out": self.scale_out,
            "variance": self.variance,
            "curve": self.curve,
        }
        write_checkpoint(self.folder / _CHECKPOINT, held)
        facts = {
            "corpus": self.corpus_name,
            "scale": self.scale,
            "scale_out": self.scale_out,
            "variance": self.variance,
        }
        write_json_atomic(self.folder / _CURVE, {**self.key, **facts, "curve": self.curve})


def _live_stream(model: Transformer, corpus: Corpus, settings: TrainingSettings) -> ActivationStream:
    """The model's activations as it reads the training part of the text."""
    return ActivationStream(
        model,
        corpus,
        settings.site,
        settings.layer,
        batch_tokens=settings.batch_tokens,
        buffer_tokens=settings.buffer_tokens,
        seed=settings.seed,
        target=settings.target,
    )


_HEADED = ("attn.q", "attn.k", "attn.v", "attn.rot_q", "attn.rot_k", "attn.v_out")


def _scale(activations: Tensor) -> float:
    """What brings the mean norm of activations [tokens, width] to the root of their width."""
    return float(activations.shape[-1] ** 0.5 / activations.norm(dim=-1).mean())
