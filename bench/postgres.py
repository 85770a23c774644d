"""A PostgreSQL server of one's own, for tests and benchmarks: a temporary directory, a Unix socket.

It imports nothing of this repository: the tests load it by its path.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

_PROGRAMS = ("initdb", "postgres", "pg_isready", "psql")

_PREFIX = "pollard-pg-"
"""Of the folders; the id of the process that made it follows."""

MISSING = "PostgreSQL is not installed; apt-get install postgresql, or put initdb on the PATH"


def binaries() -> Path | None:
    """Return the folder of PostgreSQL's programs, the newest where there are several."""
    installed = [
        path
        for path in Path("/usr/lib/postgresql").glob("*/bin")
        if all((path / program).exists() for program in _PROGRAMS)
    ]
    if not installed:
        found = shutil.which("initdb")
        path = Path(found).resolve().parent if found else None
        return path if path and all((path / program).exists() for program in _PROGRAMS) else None
    return max(installed, key=lambda path: float(path.parent.name))


def sweep() -> None:
    """End the servers, and delete the folders, of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if not owner.isdigit() or Path(f"/proc/{owner}").exists():
            continue
        with contextlib.suppress(OSError, ValueError):
            server = int((folder / "data" / "postmaster.pid").read_text().split()[0])
            if Path(f"/proc/{server}/cwd").readlink() == folder / "data":
                os.kill(server, signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)


class Postgres:
    """One server. It refuses to run as root, so then it runs as `postgres` or `nobody`.

    Args:
        durable: Wait for the disk, as a real one does. Not needed to survive kills.
        host: Address to listen on besides, for other hosts; it must be nobody else's.
        network: From where everybody may come in there, such as 10.1.2.0/24.
    """

    def __init__(self, *, durable: bool = False, host: str = "", network: str = "") -> None:
        found = binaries()
        if found is None:
            raise FileNotFoundError(MISSING)
        self._binaries = found
        self._durable = durable
        self._host = host
        # Not below a test's directory: the path of a socket is short, and its user another.
        sweep()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._user = _unprivileged_user()
        if self._user is not None:
            os.chown(self.directory, self._user.pw_uid, self._user.pw_gid)
        # Names the socket. No TCP port is used: while the server is stopped, another program could
        # take it.
        self.port = 5432
        self._made = 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._run(
                "initdb",
                *("-D", str(self.directory / "data"), "-U", "pollard", "-A", "trust"),
                *("-E", "UTF8", "--locale=C.UTF-8", "--no-sync"),
            )
            if network:
                with (self.directory / "data" / "pg_hba.conf").open("a") as access:
                    access.write(f"host all all {network} trust\n")
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {
            "listen_addresses": self._host,
            "port": str(self.port),
            "unix_socket_directories": str(self.directory),
            "max_connections": "200",
            "fsync": "on" if self._durable else "off",
            "shared_buffers": "64MB",
        }
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command("postgres", "-D", str(self.directory / "data"), *words),
                stdout=log,
                stderr=log,
                cwd="/",
                user=self._user.pw_uid if self._user else None,
                group=self._user.pw_gid if self._user else None,
                extra_groups=[] if self._user else None,
            )
        until = time.monotonic() + 60
        while True:
            ready = subprocess.run(
                self._command("pg_isready", "-q", "-h", str(self.directory), "-p", str(self.port)),
                check=False,
            )
            if ready.returncode == 0:
                return
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"PostgreSQL did not start:\n{self.said()}")
            time.sleep(0.02)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT ends every connection, SIGQUIT is a crash."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(60)

    def close(self) -> None:
        """Stop it, and delete what it kept."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    def said(self) -> str:
        """Return its log."""
        log = self.directory / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def url(self, database: str, *, tcp: bool = False) -> str:
        """Return the URL of a database, by the socket or by TCP."""
        if tcp:
            return f"postgresql://pollard@{self._host}:{self.port}/{database}"
        where = quote(str(self.directory), safe="")
        return f"postgresql://pollard@/{database}?host={where}&port={self.port}"

    def new_database(self, template: str = "template0") -> str:
        """Make a database, empty or a copy of another, and return its name."""
        self._made += 1
        name = f"test_{self._made}"
        self.sql("postgres", f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    def drop_database(self, name: str) -> None:
        """Delete a database."""
        self.sql("postgres", f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def sql(self, database: str, statement: str) -> str:
        """Carry out a statement, and return what it gives as plain text."""
        done = subprocess.run(
            self._command(
                *("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "pollard"),
                *("-h", str(self.directory), "-p", str(self.port), "-d", database, "-c", statement),
            ),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{statement}: {done.stderr}")
        return done.stdout.strip()

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [str(self._binaries / program), *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            self._command(program, *arguments),
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            user=self._user.pw_uid if self._user else None,
            group=self._user.pw_gid if self._user else None,
            extra_groups=[] if self._user else None,
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr or done.stdout}")


def _unprivileged_user() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("PostgreSQL refuses to run as root, and there is no other user to run it as")
