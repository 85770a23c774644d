"""`pollard serve` out of a source tree where nothing is installed: `python -m bench.pollard`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run `serve SERVICE OPTIONS…` and return its exit code."""
    from pollard.services.common.errors import StartupError
    from pollard.services.up.serve import serve_command

    if len(sys.argv) < 3 or sys.argv[1] != "serve":
        print("usage: python -m bench.pollard serve SERVICE [OPTIONS]", file=sys.stderr)
        return 2
    try:
        return serve_command(sys.argv[2], sys.argv[3:])
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
