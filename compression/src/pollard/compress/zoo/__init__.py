"""Classic CNNs, with the input that each takes and how it is best trained."""

from pollard.compress.zoo.registry import ENTRIES, Entry, TrainDefaults, find

__all__ = ["ENTRIES", "Entry", "TrainDefaults", "find"]
