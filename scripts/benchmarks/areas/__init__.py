"""One file for each area; see `benchmarks`."""
