"""Fuzzing of what reads what others wrote: `python -m bench.fuzz TARGET --seconds 600`."""
