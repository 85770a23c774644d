"""`pollard serve`, `train` and `compress` out of a source tree where nothing is installed:
`python -m bench.pollard`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run `serve SERVICE OPTIONS…`, or a command of compression, and return its exit code."""
    if len(sys.argv) > 1 and sys.argv[1] in ("train", "compress"):
        import typer

        from pollard.compress.cli import register

        app = typer.Typer()
        register(app)
        app()
    from pollard.services.common.errors import StartupError
    from pollard.services.up.serve import serve_command

    if len(sys.argv) < 3 or sys.argv[1] != "serve":
        print(
            "usage: python -m bench.pollard serve SERVICE | train | compress [OPTIONS]",
            file=sys.stderr,
        )
        return 2
    try:
        return serve_command(sys.argv[2], sys.argv[3:])
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
