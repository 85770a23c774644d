"""The `pollard` command: its root, and the commands that only need the client."""

from pollard.client.cli._main import main

__all__ = ["main"]
