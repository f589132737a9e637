"""Benchmarks against other libraries: `scripts/bench.py` runs them.

An area is a file in `areas/` with a docstring that says what is compared, and

    TARGETS: dict[str, str]                 what the ratios should be, for the reader
    cases(tiny: bool) -> list[Case]         the shapes; tiny ones for tests
    peers() -> list[Peer]                   who is measured, ours first
    prepare(case: Case, folder: Path)       writes weights and inputs that all peers read (optional)

Area files import libraries inside functions only: each is read in the environment of every peer.
"""
