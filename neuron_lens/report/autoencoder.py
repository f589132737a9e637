"""The page of one autoencoder's evaluation: its figures, how often latents fire, and which classes are absorbed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuron_lens.report.charts import histogram_svg
from neuron_lens.report.html import Child, Html, element, fragment
from neuron_lens.report.tables import fact_list, table
from neuron_lens.report.words import decimals, percent

__all__ = ["autoencoder_body", "evaluation_facts"]

_LATENTS_SHOWN = 6


def autoencoder_body(evaluation: Mapping[str, Any]) -> Html:
    """The page's body. evaluation: the fields of `neuron_lens.autoencoder_training.Evaluation`."""
    e = evaluation
    where = e["site"] if e["layer"] is None else f"{e['site']}, layer {e['layer']}"
    return fragment(
        element(
            "header",
            element("h1", f"Autoencoder of {e['model']}"),
            element(
                "p",
                f"{e['d_latent']:,} latents for {where}, evaluated on {e['n_tokens']:,} tokens of {e['corpus']} "
                f"({e['split']}).",
                class_="note",
            ),
        ),
        element(
            "main",
            element("h2", "Figures"),
            fact_list(evaluation_facts(e)),
            element("h2", "How often latents fire"),
            element(
                "p",
                f"{e['never_fired']:,} of {e['d_latent']:,} never fired on these tokens and count in the lowest bin; "
                f"{e['dense']:,} fire on more than one token in ten.",
            ),
            histogram_svg(
                e["density_edges"],
                e["density_counts"],
                title="Latents by how often they fire",
                x_label="share of tokens, as a power of ten",
                y_label="latents",
                log_counts=True,
            ),
            element("h2", "Absorption"),
            _absorption(e.get("absorption") or ()),
        ),
    )


def evaluation_facts(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the figures, in words."""
    e = evaluation
    recovered = (_share(e["loss_recovered_mean"]), _share(e["loss_recovered_zero"]))
    rows = [
        ("variance explained", f"{e['variance_explained']:.4f}"),
        ("active latents per token", f"{e['l0']:.1f}"),
        ("loss: intact", f"{e['loss_intact']:.4f}"),
        ("loss: reconstruction", f"{e['loss_spliced']:.4f}"),
        ("loss: mean, zeros", f"{e['loss_mean']:.4f}, {e['loss_zero']:.4f}"),
        ("loss recovered: mean, zeros", ", ".join(recovered)),
        ("latents that never fired", f"{e['never_fired']} of {e['d_latent']}"),
        ("latents on over 10 % of tokens", str(e["dense"])),
    ]
    if e.get("absorption_rate") is not None:
        rows += [
            ("absorption, mean of classes", f"{e['absorption_rate']:.4f} ({len(e['absorption'])} classes)"),
            ("latents that absorb", str(e["absorbing_latents"])),
        ]
    return rows


def _absorption(classes: Sequence[Mapping[str, Any]]) -> Html:
    if not classes:
        return element(
            "p",
            "No class of tokens was told well enough both by a probe and by a latent to be judged.",
            class_="note",
        )
    rows: list[list[Child]] = [
        [
            each["name"],
            f"{each['n_tokens']:,}",
            decimals(each["probe_f1"]),
            _latents(each["main_latents"]),
            decimals(each["main_f1"]),
            percent(each["n_absorbed"] / max(1, each["n_found"])),
            _latents(each["absorbing_latents"]),
        ]
        for each in sorted(classes, key=lambda each: -each["n_absorbed"] / max(1, each["n_found"]))
    ]
    heads = ["Class", "Tokens", "Probe F1", "Its latents", "Their F1", "Absorbed", "By"]
    return fragment(
        element(
            "p",
            "Tokens that a linear probe finds, on which no latent of the class fires, and for which another latent "
            "writes most of what points the probe's way (Chanin et al. 2024, by projection).",
            class_="note",
        ),
        element("div", table(heads, rows, figures=frozenset({1, 2, 4, 5})), class_="scroll"),
    )


def _latents(which: Sequence[int]) -> str:
    shown = ", ".join(str(latent) for latent in which[:_LATENTS_SHOWN])
    more = len(which) - _LATENTS_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown or "none"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
