"""Benchmarks: commands that are run from the repository's root, `python -m bench.serving`."""
