"""What the commands need to sign: the key, its passphrase, and the part that does it.

Signing itself is `pollard.runtime.signing`, which this distribution does not ask for: with its
extra `[signing]` it is there.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pollard.client.errors import PollardError

PASSPHRASE_VARIABLE = "POLLARD_KEY_PASSPHRASE"  # noqa: S105 - only its name

SignOption = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        metavar="KEY",
        help="Sign the bundle with this private key (`pollard keys create` makes one). A "
        f"passphrase is taken from {PASSPHRASE_VARIABLE}, or asked for.",
        show_default=False,
    ),
]


def runtime_module(name: str) -> Any:
    """Return a module of the runtime.

    Raises:
        PollardError: it is not installed.
    """
    try:
        return importlib.import_module(f"pollard.runtime.{name}")
    except ImportError as error:
        raise PollardError(
            f"signatures need a package that is not here ({error}); install it with "
            "`pip install 'pollard-client[signing]'`"
        ) from error


def passphrase_for(key: Path) -> bytes | None:
    """Return the passphrase of a private key; None when it has none."""
    if not runtime_module("keys").is_encrypted(key):
        return None
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given:
        return given.encode()
    if not sys.stdin.isatty():
        raise PollardError(f"{key} is protected by a passphrase; set {PASSPHRASE_VARIABLE}")
    return str(typer.prompt(f"Passphrase of {key}", hide_input=True, err=True)).encode()


def signer(key: Path | None) -> Callable[[Path], str] | None:
    """Return what signs a bundle's directory and returns the key's fingerprint; None without key.

    The key is tried at once, so that a long command does not fail at its end.

    Raises:
        PollardError: signing is not installed, or nobody gave the passphrase.
        RuntimeFault: the key cannot be used.
        OSError: it cannot be read.
    """
    if key is None:
        return None
    passphrase = passphrase_for(key)
    signing = runtime_module("signing")
    runtime_module("keys").private_fingerprint(key, passphrase)
    signing.prepare()
    return lambda directory: str(signing.sign_bundle(directory, key, passphrase))
