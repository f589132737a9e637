"""Reports: typed results in, self-contained HTML pages out.

Runs without torch and without a template engine. A page holds its own style, script and drawings, refers to
nothing on a network, and says so to the browser (a content security policy that allows only its own two
inline blocks, by their hashes).

    html      a tiny builder whose output is escaped by construction
    heatmap   tokens and their activations -> highlighted text
    charts    numbers -> SVG
    pages     results -> pages and the folder they live in
"""

from __future__ import annotations

from neuron_lens.report.pages import autoencoder_page, index_page, unit_page, write_pages

__all__ = ["autoencoder_page", "index_page", "unit_page", "write_pages"]
