# Made by clients/python/generate_sync.py from _async/__init__.py; change that file instead.
"""The sync clients, made from `_async` by `generate_sync.py`."""
