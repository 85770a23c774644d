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


def signal_when_parent_ends(parent: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, where it can (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have ended before the line above; then nobody will send the signal.
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Run `child PARENT_PID SERVICE ARGUMENTS…`."""
    parent, service, *arguments = sys.argv[1:]
    signal_when_parent_ends(int(parent), signal.SIGKILL)
    if service == "balancer":
        from pollard.services.up.balancer import become_envoy

        # The kernel's promise outlasts the change of the program.
        become_envoy(arguments)
    # Services start child processes by fork and exec; gRPC's own handlers, meant for forks without
    # exec, would only write warnings about them. It reads this when it is imported.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from typer.exceptions import TyperException

    from pollard.services.common.errors import StartupError
    from pollard.services.up.serve import serve_command

    try:
        code = serve_command(service, arguments)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        code = getattr(error, "exit_code", 1)
    except TyperException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
