"""What was recorded of a forward pass, and how parts of it are picked."""

from __future__ import annotations

from neuron_lens.cache.slices import Slice, SliceInput

__all__ = ["Slice", "SliceInput"]
