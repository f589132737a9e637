"""How much memory a harvest takes, phase by phase: peak resident memory of a process of its own. Linux only.

    python scripts/harvest_memory.py --layers 12 --units 3072 --tokens 60000
    python scripts/harvest_memory.py --units 131072 --active 64 --tokens 20000 --open 4

A random model is narrow (the forward takes no time; --width 768 is that of GPT-2 small), its units as many as asked
for: neurons of every layer, or with --active the latents of one layer's random top-k autoencoder. Peaks count mapped
files, as the system does. With --open, units are then read and explained in another process, as `neuron-lens explain`
does.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure in processes of their own; print a line a phase."""
    given = _arguments()
    if given.child:
        print(json.dumps({"harvest": _harvest, "open": _open}[given.child](given)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for child in ["harvest", *(["open"] if given.open else [])]:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", child, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            for phase in json.loads(done.stdout.splitlines()[-1]):
                print(f"{phase['name']:24} {phase['peak']:8.0f} MB at most {phase['seconds']:8.1f} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--active", type=int, default=0, help="latents active at a token (0: neurons)")
    parser.add_argument("--width", type=int, default=32, help="of the model (d_model)")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--length", type=int, default=64, help="of a window")
    parser.add_argument("--open", type=int, default=0, help="how many units to read and explain afterwards")
    parser.add_argument("--folder", type=Path, default=None, help="where the harvest is, for a while")
    parser.add_argument("--child", choices=("harvest", "open"), help=argparse.SUPPRESS)
    return parser.parse_args()


class Phases:
    """Peak memory and time of every phase, of the phases around another one without that one's."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {}
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside counts for this phase, but for what other phases inside it measure."""
        self._close()
        self.seen.setdefault(name, {"name": name, "peak": 0.0, "seconds": 0.0})
        self._open.append(name)
        yield
        self._close()
        self._open.pop()

    def _close(self) -> None:
        """What was since the last phase began or ended belongs to the innermost open one."""
        if self._open:
            own = self.seen[self._open[-1]]
            own["peak"] = max(own["peak"], _status("VmHWM") / 1e6)
            own["seconds"] += time.perf_counter() - self._since
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free must not hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._since = time.perf_counter()

    def wrap(self, module: Any, name: str, title: str) -> None:
        """Measure a module's function at every call."""
        function: Callable[..., Any] = getattr(module, name)

        def measured(*arguments: Any, **options: Any) -> Any:
            with self.phase(title):
                return function(*arguments, **options)

        setattr(module, name, measured)

    def table(self) -> list[dict[str, Any]]:
        """What was measured, in order."""
        return list(self.seen.values())


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _made(given: argparse.Namespace) -> tuple[Any, Any, list[Any], Any]:
    """Model, corpus, sources and settings."""
    import torch

    from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site
    from neuron_lens.harvest.corpus import Corpus, Document, WindowShape
    from neuron_lens.harvest.settings import HarvestSettings
    from neuron_lens.harvest.sources import LatentSource, NeuronSource
    from neuron_lens.tokenizers import bytes_tokenizer
    from neuron_lens.transformer import Transformer, TransformerConfig

    torch.set_num_threads(1)
    tokenizer = bytes_tokenizer()
    config = TransformerConfig(
        name="random", n_layers=given.layers, d_model=given.width, n_heads=max(2, given.width // 64), n_ctx=256,
        d_vocab=tokenizer.vocab_size,
        d_mlp=4 * given.width if given.active else given.units,
    )  # fmt: skip
    model = Transformer(config, seed=0, tokenizer=tokenizer).eval().requires_grad_(False)
    draw = random.Random(0)
    texts = ("".join(draw.choices(string.printable, k=4000)) for _ in range(max(1, given.tokens // 4000)))
    corpus = Corpus.of_documents([Document(f"{number}", text) for number, text in enumerate(texts)])
    if given.active:
        own = AutoencoderConfig(
            d_in=given.width, d_latent=given.units, activation="topk", k=given.active,
            site_in=Site(path="resid.torso.post_mlp", layer=0),
        )  # fmt: skip
        autoencoder = Autoencoder(own, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
        sources: list[Any] = [LatentSource(model, autoencoder)]
    else:
        sources = [NeuronSource(model, layer) for layer in range(given.layers)]
    shape = WindowShape(length=given.length, context=given.length, row_length=4 * given.length)
    return model, corpus, sources, HarvestSettings(shape=shape)


def _harvest(given: argparse.Namespace) -> list[dict[str, Any]]:
    from neuron_lens.harvest import finish, run
    from neuron_lens.harvest.shard import LayerHarvest

    phases = Phases()
    with phases.phase("model and corpus"):
        model, corpus, sources, settings = _made(given)
    phases.wrap(run, "_pass", "collecting")
    phases.wrap(finish, "gather_windows", "text of the windows")
    phases.wrap(finish.Sampled, "of", "sample")
    phases.wrap(finish, "nearest_units", "nearest units")
    phases.wrap(finish.NearMisses, "take_sample", "near misses")
    phases.wrap(run, "read_again", "reading again")
    phases.wrap(LayerHarvest, "write", "writing")
    with phases.phase("finishing"):
        run.harvest(model, corpus, sources, given.folder / "harvest", settings, progress=False)
    size = sum(path.stat().st_size for path in given.folder.rglob("*") if path.is_file()) / 1e6
    return [*phases.table(), {"name": "(on disk)", "peak": size, "seconds": 0.0}]


def _open(given: argparse.Namespace) -> list[dict[str, Any]]:
    from neuron_lens.explain.source_work import SourceWork
    from neuron_lens.harvest.reproduce import reproduce
    from neuron_lens.harvest.settings import model_fingerprint
    from neuron_lens.harvest.shard import LayerHarvest

    phases = Phases()
    with phases.phase("model and corpus"):
        model, _, sources, _ = _made(given)
        source = sources[-1]
    with phases.phase("opening"):
        harvest = LayerHarvest.open(given.folder / "harvest" / source.name)
        assert harvest is not None, "it was just written"
    step = max(1, given.units // given.open)
    chosen = [index for index in range(step // 2, given.units, step) if harvest.maxima[index] > 0]
    with phases.phase(f"reading {len(chosen)} units"):
        for index in chosen:
            harvest.unit(index)
    with phases.phase(f"explaining {len(chosen)} units"):
        work = SourceWork(source, harvest)
        for index in chosen:
            work.evidence(index)
    with phases.phase("verifying 8 units"):
        reproduce(source, harvest.folder, model_fingerprint(model))
    return phases.table()


if __name__ == "__main__":
    main()
