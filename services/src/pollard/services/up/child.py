"""The process of one service under a supervisor: `python -m pollard.services.up.child`.

It dies with its supervisor, also when that is killed with -9, so that no service is left behind
holding a port and the store.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, where the kernel can (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have ended before the line above; then nobody will send the signal.
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Run `child PARENT_PID SERVICE ARGUMENTS…`."""
    parent, service, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    from typer.exceptions import TyperException

    from pollard.services.common.errors import StartupError
    from pollard.services.up.serve import serve_command

    try:
        code = serve_command(service, arguments)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except TyperException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
