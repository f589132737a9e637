#!/usr/bin/env python3
"""Hold edge attribution against ground truth on `pico`: every edge patched alone, and rank correlations with the estimates.

    python scripts/attribution_on_pico.py [--rows 6] [--tasks for isinstance self] [--units]

Prompts are Python snippets in which a name must be repeated; the corrupted ones have another name of the same length. An edge's
exact effect is the change of the logit difference (clean name − other name) when that edge alone carries its corrupted value.
Printed for each estimate: Spearman's correlation with the exact effects over all edges, signed and in size; how many of
the 100 largest edges it finds; and how faithful the circuit of its 200 greedily chosen edges is.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from neuron_lens import Transformer
from neuron_lens.autoencoders import Autoencoder, load_autoencoder
from neuron_lens.files.model_defs import model_defs_dir
from neuron_lens.interventions import (
    Ablation,
    Circuit,
    GraphShape,
    LogitDifference,
    Units,
    attribute_edges,
    capture,
    exact_edge_effects,
    score_circuit,
)

SNIPPETS = {
    "for": "for {} in items:\n    print(",
    "isinstance": "def check({}):\n    if not isinstance(",
    "self": "    def __init__(self, {}):\n        self.{} =",
}
NAMES = ["name", "path", "key", "value", "data", "line", "text", "index", "item", "node", "size", "code"]
METHODS = {
    "EAP": "gradient",
    "EAP-IG, inputs": "integrated_inputs",
    "EAP-IG, activations": "integrated_activations",
}
TOP, EDGES = 100, 200


def pairs(model: Transformer, snippet: str, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean and corrupted prompts [row, pos], and the tokens that continue them [row]."""
    tokenizer: Any = model.tokenizer
    clean = [tokenizer.encode(snippet.replace("{}", name)) for name in NAMES[:rows]]
    other = NAMES[1:rows] + NAMES[:1]
    corrupted = [tokenizer.encode(snippet.replace("{}", name)) for name in other]
    before = " " if snippet.endswith("=") else ""
    first = tokenizer.encode("")
    answers = [
        [tokenizer.encode(before + name)[len(first)] for name in names] for names in (NAMES[:rows], other)
    ]
    return tuple(torch.tensor(part) for part in (clean, corrupted, *answers))  # type: ignore[return-value]


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation; ties are rare enough among scores to be ranked as they come."""
    ranks = torch.stack([one.argsort().argsort().double() for one in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


def chosen_units(model: Transformer, tokens: Tensor, autoencoder: Autoencoder, count: int) -> list[Units]:
    """The neurons of layer 3 and the latents of the autoencoder that are most active at the last position."""
    site = autoencoder.config.site_in
    assert site is not None and site.layer is not None, "pico's own autoencoder says where it reads"
    stream = capture(model, tokens, site.path, layers=site.layer)[site.path, site.layer][:, -1]
    latents = autoencoder.encode(stream).mean(0).topk(count).indices.tolist()
    neurons = capture(model, tokens, "mlp.post_act", layers=3)["mlp.post_act", 3][:, -1]
    strongest = neurons.abs().mean(0).topk(count).indices.tolist()
    return [Units.neurons(3, strongest), Units.latents("sae", autoencoder, latents)]


@torch.no_grad()
def compare(model: Transformer, task: str, rows: int, units: list[Units], autoencoder: Autoencoder) -> None:
    """Print how each estimate compares with the exact effects."""
    clean, corrupted, right, wrong = pairs(model, SNIPPETS[task], rows)
    metric = LogitDifference(right, wrong)
    ablation, options = Ablation("patch", corrupted), {"autoencoders": {"sae": autoencoder}}
    shape = GraphShape.of(model.config, units)
    wanted = shape.possible
    if units:  # only the edges that are new
        of_units = torch.tensor([node.unit is not None for node in shape.senders])
        into_units = torch.tensor([port.unit is not None for port in shape.receivers])
        wanted = wanted & (of_units[:, None] | into_units)
    start = time.perf_counter()
    exact = exact_edge_effects(model, clean, ablation, metric, Circuit(shape, None, wanted), **options)
    seconds = time.perf_counter() - start
    truth = exact.scores[exact.kept]
    ends = [float(metric(model(prompts), prompts).mean()) for prompts in (clean, corrupted)]
    print(
        f"\n{task}: {clean.shape[0]} pairs of {clean.shape[1]} tokens; logit difference {ends[0]:.2f} clean, {ends[1]:.2f} "
        f"corrupted; {len(truth)} edges patched one by one in {seconds:.0f} s"
    )
    print(f"{'':22}{'Spearman':>9}{'of sizes':>9}{f'top {TOP}':>9}{'faithful':>9}{'seconds':>9}")
    for name, method in METHODS.items():
        start = time.perf_counter()
        found = attribute_edges(model, clean, ablation, metric, method=method, units=units, **options)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        scores = found.scores[exact.kept]
        shared = set(scores.abs().topk(TOP).indices.tolist()) & set(truth.abs().topk(TOP).indices.tolist())
        faithful = score_circuit(model, clean, found.greedy(EDGES), ablation, metric, **options).faithfulness
        print(
            f"{name:22}{spearman(scores, truth):9.3f}{spearman(scores.abs(), truth.abs()):9.3f}"
            f"{len(shared):9d}{faithful:9.2f}{seconds:9.2f}"
        )


def main() -> None:
    """Run the tasks named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=6, help="pairs of prompts, at most 12")
    parser.add_argument("--tasks", nargs="*", choices=list(SNIPPETS), default=list(SNIPPETS))
    parser.add_argument("--units", action="store_true", help="the edges of 4 neurons and 4 latents instead")
    given = parser.parse_args()
    model = Transformer.load("pico").requires_grad_(False)
    autoencoder = load_autoencoder(model_defs_dir() / "pico" / "sae", dtype=torch.float32)
    for task in given.tasks:
        clean = pairs(model, SNIPPETS[task], given.rows)[0]
        units = chosen_units(model, clean, autoencoder, 4) if given.units else []
        compare(model, task, given.rows, units, autoencoder)


if __name__ == "__main__":
    main()
