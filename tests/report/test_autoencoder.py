"""The page of an autoencoder: all figures, nothing from a network, and names that cannot break out."""

from __future__ import annotations

from typing import Any

from neuron_lens.report import autoencoder_page

EVALUATION: dict[str, Any] = {
    "model": "tiny", "site": "resid.torso.post_mlp", "layer": 1, "corpus": "<script>letters", "split": "test",
    "n_tokens": 12345, "n_loss_tokens": 12000, "d_latent": 64, "variance_explained": 0.87654,
    "mean_squared_error": 3.5, "l0": 7.25, "loss_intact": 2.1, "loss_spliced": 2.25, "loss_zero": 6.0,
    "loss_mean": 5.0, "loss_recovered_zero": 0.9615, "loss_recovered_mean": None, "never_fired": 3,
    "dead_share": 3 / 64, "dense": 2, "density_edges": [-3.0, -2.0, -1.0, 0.0], "density_counts": [9, 50, 5],
}  # fmt: skip
CLASSES = [
    {
        "name": "digits", "n_tokens": 90, "probe_f1": 0.97, "main_latents": [4], "main_f1": 0.8, "n_found": 80,
        "n_missed": 30, "n_absorbed": 20, "absorbing_latents": [17, 3, 9, 10, 11, 12, 13],
    },
]  # fmt: skip


def test_it_holds_every_figure_and_asks_no_network() -> None:
    page = autoencoder_page(
        {**EVALUATION, "absorption": CLASSES, "absorption_rate": 0.25, "absorbing_latents": 7}
    )
    for shown in (
        "0.8765",
        "7.2",
        "12,345",
        "-, 0.9615",
        "3 of 64",
        "25 %",
        "17, 3, 9, 10, 11, 12 and 1 more",
    ):
        assert shown in page, shown
    assert page.count("<rect") >= 3 and "Latents by how often they fire" in page
    assert "&lt;script&gt;letters" in page and "<script>letters" not in page
    for foreign in ("http:", "https:", "src=", "@import", "url("):
        assert foreign not in page.replace("http://www.w3.org/2000/svg", ""), foreign
    assert "default-src &#x27;none&#x27;" in page


def test_without_classes_it_says_so() -> None:
    page = autoencoder_page(EVALUATION)
    assert "No class of tokens was told well enough" in page and "latents that absorb" not in page
