"""The training loop: from a stream of activations to an autoencoder, in steps that can be interrupted.

    batch -> scale -> objective (+ auxiliary loss) -> Adam, with decoder rows of length 1

A checkpoint holds weights, optimiser, counters and the step; the stream is taken up by its position. So an
interrupted run continues as if it had not been: on the same machine to the bit.
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
from neuron_lens.autoencoder_training.objectives import Pass, auxiliary_loss, build_objective
from neuron_lens.autoencoder_training.settings import TrainingSettings
from neuron_lens.autoencoder_training.stream import ActivationStream
from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Provenance, Site, save_saelens
from neuron_lens.autoencoders.activations import JumpReLU
from neuron_lens.autoencoders.folding import fold_scale
from neuron_lens.files.atomic import write_json_atomic
from neuron_lens.harvest.run import fitting_shape, model_fingerprint

if TYPE_CHECKING:
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.transformer import Transformer

__all__ = ["Trainer", "train_autoencoder"]

_CHECKPOINT = "checkpoint.pt"
_CURVE = "training.json"
_LARGEST_GRADIENT = 1.0  # norm at which gradients are clipped


def train_autoencoder(
    model: Transformer,
    corpus: Corpus,
    settings: TrainingSettings,
    folder: str | Path,
    *,
    progress: bool = True,
    checkpoint_every: int = 200,
) -> Autoencoder:
    """Train an autoencoder on a site of a model, or go on with an interrupted run of the same settings.

    Args:
        folder: gets `checkpoint.pt` and `training.json` (settings and the curve) on the way, and at the end
            the autoencoder as a SAELens folder.
        progress: show a bar with loss, L0, variance explained and the share of dead latents.
        checkpoint_every: steps; how often changes nothing in the result.

    Returns:
        Autoencoder: for activations as the model gives them; the scale of training is folded in.

    Raises:
        RequestError: a site or layer the model does not have, too little text, or a checkpoint of another run in the folder.
        CheckpointError: the checkpoint is damaged.
    """
    trainer = Trainer(model, corpus, settings, folder)
    trainer.run(progress=progress, checkpoint_every=checkpoint_every)
    return trainer.finish()


class Trainer:
    """One training run. `run` may be called again and again until `step` is `settings.n_steps`."""

    def __init__(
        self, model: Transformer, corpus: Corpus, settings: TrainingSettings, folder: str | Path
    ) -> None:
        self.model, self.settings, self.folder = model, settings, Path(folder)
        self.stream = ActivationStream(
            model,
            corpus,
            settings.site,
            settings.layer,
            batch_tokens=settings.batch_tokens,
            buffer_tokens=settings.buffer_tokens,
            seed=settings.seed,
        )
        self.key = {
            "settings": settings.model_dump(mode="json"),
            "model": model_fingerprint(model),
            "corpus": corpus.fingerprint,
        }
        self.corpus_name = corpus.name
        self.step = 0
        self.curve: list[dict[str, float]] = []
        saved = read_checkpoint(self.folder / _CHECKPOINT, self.key)
        if saved is None:
            self._begin()
        else:
            self._continue(saved)

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
        config, weights = fold_scale(
            self.autoencoder.config,
            {name: tensor.detach().clone() for name, tensor in self.autoencoder.state_dict().items()},
            self.scale,
            self.scale,
        )
        finished = Autoencoder(config, device=self.autoencoder.W_dec.device)
        finished.load_state_dict(weights)
        save_saelens(finished, self.folder)
        return finished.eval().requires_grad_(False)

    def _begin(self) -> None:
        """Estimate scale and variance from the first buffer, and make the weights."""
        first = self.stream.buffer(0).float()
        d_in = first.shape[-1]
        self.scale = float(d_in**0.5 / first.norm(dim=-1).mean())
        first = first * self.scale
        self.variance = float((first - first.mean(0)).square().sum(-1).mean())
        self._build(d_in, first.device)
        with torch.no_grad():
            self.autoencoder.b_dec.copy_(first.mean(0))
        self.objective.prepare(self.autoencoder)
        self.unfired = torch.zeros(self.settings.d_latent, dtype=torch.int64, device=first.device)

    def _continue(self, saved: dict[str, Any]) -> None:
        self.scale, self.variance, self.step = saved["scale"], saved["variance"], saved["step"]
        self.curve = saved["curve"]
        self._build(saved["autoencoder"]["W_dec"].shape[-1], self.model.embed.weight.device)
        self.autoencoder.load_state_dict(saved["autoencoder"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.unfired = saved["unfired"].to(self.autoencoder.W_dec.device)

    def _build(self, d_in: int, device: torch.device) -> None:
        settings = self.settings
        site = Site(path=settings.site, layer=settings.layer)
        begins = bool(self.model.tokenizer.adds_bos)  # every row begins with that token
        config = AutoencoderConfig(
            d_in=d_in,
            d_latent=settings.d_latent,
            activation=settings.activation,
            k=settings.k,
            group_sizes=settings.group_sizes,
            input_bias="decoder_bias",
            flatten_heads=settings.site in _HEADED and d_in != self.model.config.d_head,
            site_in=site,
            site_out=site,
            model_name=self.model.config.name or None,
            context_size=fitting_shape(self.model).row_length + begins,
            prepend_bos=begins,
            provenance=Provenance(format="neuron_lens", path=str(self.folder), source_config=self.key),
        )
        generator = torch.Generator().manual_seed(settings.seed)
        self.autoencoder = Autoencoder(config, generator=generator).to(device).train()
        self.optimiser = torch.optim.Adam(
            [p for p in self.autoencoder.parameters() if p.requires_grad], lr=settings.peak_rate
        )
        self.objective = build_objective(settings, self.variance)

    def _one_step(self, batch: Tensor) -> dict[str, float]:
        settings, autoencoder = self.settings, self.autoencoder
        x = batch.to(device=autoencoder.W_dec.device, dtype=torch.float32) * self.scale
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate_at(self.step)
        dead = self.unfired > settings.dead_after
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=settings.autocast):
            done: Pass = self.objective(autoencoder, x, self.step / settings.n_steps)
            auxiliary = auxiliary_loss(autoencoder, x, done, dead, self._auxiliary_k)
        (done.loss + settings.auxiliary_weight * auxiliary).backward()
        _drop_parallel_gradient(autoencoder)
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), _LARGEST_GRADIENT)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        _normalise_rows(autoencoder)
        self.unfired = torch.where(done.fired, 0, self.unfired + len(x))
        self.step += 1
        with torch.no_grad():
            missed = self.objective.unexplained(x, done.reconstruction)
        facts = {
            "step": float(self.step),
            "loss": float(done.loss.detach()),
            "auxiliary_loss": float(auxiliary.detach()),
            "l0": float(done.active),
            "variance_explained": 1 - float(missed),
            "dead_share": float(dead.float().mean()),
        }
        if self.step % max(1, settings.n_steps // 200) == 0 or self.step == settings.n_steps:
            self.curve.append(facts)
        return facts

    @property
    def _auxiliary_k(self) -> int:
        return self.settings.auxiliary_k or max(1, self.autoencoder.config.d_in // 2)

    def _save(self) -> None:
        held = {
            "key": json.dumps(self.key, sort_keys=True),
            "autoencoder": self.autoencoder.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "unfired": self.unfired,
            "scale": self.scale,
            "variance": self.variance,
            "step": self.step,
            "curve": self.curve,
        }
        write_checkpoint(self.folder / _CHECKPOINT, held)
        facts = {"corpus": self.corpus_name, "scale": self.scale, "variance": self.variance}
        write_json_atomic(self.folder / _CURVE, {**self.key, **facts, "curve": self.curve})


_HEADED = ("attn.q", "attn.k", "attn.v", "attn.rot_q", "attn.rot_k", "attn.v_out")


def _drop_parallel_gradient(autoencoder: Autoencoder) -> None:
    """Take out what would only change the length of decoder rows, which is put back to 1 anyway."""
    rows, gradient = autoencoder.W_dec.data, autoencoder.W_dec.grad
    if gradient is not None:
        gradient -= (gradient * rows).sum(-1, keepdim=True) * rows


@torch.no_grad()
def _normalise_rows(autoencoder: Autoencoder) -> None:
    autoencoder.W_dec.div_(autoencoder.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    if isinstance(autoencoder.activation, JumpReLU):
        autoencoder.activation.threshold.clamp_(min=0)
