"""`pollard keys`: keys that sign bundles, and signatures of bundles on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pollard.client.cli._common import JsonOption, fail, print_json, say
from pollard.client.cli.signing import (
    PASSPHRASE_VARIABLE,
    passphrase_for,
    runtime_module,
    signer,
)

app = typer.Typer(
    help="Make keys that sign bundles, sign bundles, and check their signatures.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Bundle = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the bundle.")]


@app.command()
def create(
    name: Annotated[
        Path,
        typer.Argument(
            metavar="NAME", help="Writes NAME.key (private) and NAME.pub (public); neither may be."
        ),
    ],
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase",
            help=f"Protect the private key by a passphrase: {PASSPHRASE_VARIABLE}, or asked for.",
        ),
    ] = False,
) -> None:
    """Make a pair of keys (elliptic curve P-256). An existing key is never overwritten.

    Keep NAME.key to yourself. NAME.pub goes to whoever checks: into the directory that
    `pollard serve models --trusted-keys` and `pollard serve inference --trusted-keys` name.
    """
    secret: bytes | None = None
    if passphrase:
        given = os.environ.get(PASSPHRASE_VARIABLE) or typer.prompt(
            "New passphrase", hide_input=True, confirmation_prompt=True, err=True
        )
        secret = str(given).encode()
    pair = runtime_module("keys").create_key_pair(name, secret)
    say(f"private key  {pair.private}" + ("" if passphrase else "  (no passphrase)"))
    say(f"public key   {pair.public}")
    say(f"fingerprint  {pair.fingerprint}")


@app.command()
def show(
    key: Annotated[
        Path, typer.Argument(metavar="KEY", help="A public or private key, or a directory of them.")
    ],
) -> None:
    """Show the fingerprint of a key, as signatures and `pollard models show` name it."""
    keys = runtime_module("keys")
    paths = [key]
    if key.is_dir():
        paths = sorted(path for path in key.iterdir() if path.suffix in (".pub", ".pem"))
        if not paths:
            fail(f"{key} holds no public key (*.pub or *.pem)")
            raise typer.Exit(1)
    for path in paths:
        if keys.is_private(path):
            fingerprint = keys.private_fingerprint(path, passphrase_for(path))
        else:
            fingerprint = keys.public_fingerprint(path)
        say(f"{fingerprint}  {path}")


@app.command()
def sign(
    directory: _Bundle,
    key: Annotated[Path, typer.Option("--key", metavar="KEY", help="Private key.")],
) -> None:
    """Sign a bundle: write its file `signature`, in place of an older one.

    Its digest stays the same. Push it again to sign a revision that is stored unsigned.
    """
    make = signer(key)
    if make is not None:
        say(f"{directory} is signed with the key {make(directory)}.")


@app.command()
def verify(
    directory: _Bundle,
    key: Annotated[
        Path,
        typer.Option(
            "--key", metavar="PUB", help="Public key, or a directory of keys that are trusted."
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Check every file of a bundle against its manifest, and its signature against a key.

    Exits with 1 unless one of the keys has signed exactly these files.
    """
    keys, signing = runtime_module("keys"), runtime_module("signing")
    trusted = (
        keys.TrustedKeys.load(key)
        if key.is_dir()
        else keys.TrustedKeys({keys.public_fingerprint(key): key})
    )
    bundle = runtime_module("bundle").Bundle.open(directory)
    found = signing.require_signature(bundle, trusted)
    if as_json:
        print_json({"bundle_sha256": bundle.digest, "key_sha256": found.fingerprint})
        return
    say(f"{directory} is whole, and signed with the key {found.fingerprint}.")
    say(f"bundle {bundle.digest}, {len(bundle.manifest.files)} files beside the manifest")
