"""The asyncio clients. `_sync` is made from this package by `generate_sync.py`."""
