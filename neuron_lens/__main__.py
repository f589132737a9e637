"""`python -m neuron_lens` is the command `neuron-lens`."""

from __future__ import annotations

import sys

from neuron_lens.cli import main

if __name__ == "__main__":
    sys.exit(main())
