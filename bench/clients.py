"""Request rate of the Node and C++ clients against gRPC's bare stub in the same language.

    python -m bench.clients [--seconds 5] [--rounds 2] [--callers 8]

The server is a C++ program that answers at once, so that the callers are what takes time. Runs are
interleaved, bare and client and client and bare; the ratio of a language is of the sums. The
toolchains of `clients/build.py` are needed for the two languages.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench.environment import environment, heading

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench" / "clients"
RATE = BUILD / "rate"
GOAL = 0.9
"""Least ratio of the client's request rate and the bare stub's."""


def build() -> None:
    """Build the C++ programs with optimisation, and the client for Node."""
    folder = ROOT / "clients" / "cpp"
    options = ("-DCMAKE_BUILD_TYPE=Release", "-DPOLLARD_BUILD_EXAMPLES=OFF")
    for command in (
        ["cmake", "-S", str(folder), "-B", str(BUILD), *options, "-DPOLLARD_BUILD_BENCH=ON"],
        ["cmake", "--build", str(BUILD), "-j", "1"],
        [sys.executable, str(ROOT / "clients" / "build.py"), "typescript"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(command: list[str], mode: str, address: str, seconds: float, callers: int) -> float:
    """Return the requests a second of one run."""
    done = subprocess.run(
        [*command, mode, address, str(seconds), str(callers)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=seconds + 60,
    )
    return int(done.stdout) / seconds


def main() -> int:
    """Print the table; return 1 when a client is too slow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of one run")
    parser.add_argument("--rounds", type=int, default=2, help="of four runs each")
    parser.add_argument("--callers", type=int, default=8, help="that ask at once")
    arguments = parser.parse_args()
    build()
    languages = {
        "C++": [str(RATE)],
        "Node": ["node", str(ROOT / "clients" / "typescript" / "bench" / "rate.mjs")],
    }
    server = subprocess.Popen(
        [str(RATE), "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    slow = False
    try:
        address = f"127.0.0.1:{server.stdout.readline().strip()}"
        print(heading(environment()) + "\n")
        print("| language | bare stub, requests/s | client, requests/s | ratio | control |")
        print("|---|---|---|---|---|")
        for language, command in languages.items():
            rates: dict[str, list[float]] = {"bare": [], "client": []}
            for _ in range(arguments.rounds):
                for mode in ("bare", "client", "client", "bare"):
                    rates[mode].append(
                        measure(command, mode, address, arguments.seconds, arguments.callers)
                    )
            bare, client = sum(rates["bare"]), sum(rates["client"])
            runs = len(rates["bare"])
            # The bare stub's runs against each other: what the machine adds by itself.
            control = sum(rates["bare"][1::2]) / sum(rates["bare"][::2])
            slow = slow or client < GOAL * bare
            print(
                f"| {language} | {bare / runs:,.0f} | {client / runs:,.0f} | {client / bare:.3f} "
                f"| {control:.3f} |",
                flush=True,
            )
    finally:
        server.communicate("\n", timeout=30)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
