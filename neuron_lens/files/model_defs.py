"""Where the data folder `model_defs/` is: family definitions and the checkpoints that ship.

In a checkout (bare or installed with `pip install -e`) it lies beside the package; in a wheel it travels
inside it, as `neuron_lens.model_defs`.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from neuron_lens.errors import CheckpointError

__all__ = ["model_defs_dir", "shipped_checkpoints"]

_PACKAGE = Path(__file__).resolve().parent.parent


def model_defs_dir() -> Path:
    """The folder `model_defs/`. Raises CheckpointError when the installation lacks it."""
    checkout = _PACKAGE.parent
    # A `model_defs` beside an installed package could be anybody's; setup.py marks our checkout.
    if (checkout / "setup.py").is_file() and (checkout / "model_defs").is_dir():
        return checkout / "model_defs"
    installed = Path(str(importlib.resources.files("neuron_lens") / "model_defs"))
    if installed.is_dir():
        return installed
    raise CheckpointError(
        f"this installation of neuron_lens lacks its data folder (looked for {checkout / 'model_defs'} and "
        f"{installed}); reinstall it with pip install --force-reinstall neuron-lens"
    )


def shipped_checkpoints() -> list[str]:
    """The names of the checkpoints that ship with the library, sorted."""
    return sorted(config.parent.name for config in model_defs_dir().glob("*/config.json"))
