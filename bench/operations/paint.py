"""The web page in a browser: the first paint, and how much is fetched for it."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.process import free_port, pollard_command

_ROUNDS = 5


def paint() -> dict[str, Any]:
    """Open the page of a manager with one model, each time in a browser without a cache."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        port, http = free_port(), free_port()
        process = subprocess.Popen(
            [
                *(*pollard_command(), "serve", "models", "--port", str(port)),
                *("--http-port", str(http), "--store", str(Path(folder) / "store")),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _until_answers(http)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=_chromium(), args=_ARGUMENTS)
                found = [_open(browser, http) for _ in range(_ROUNDS + 1)][1:]
                browser.close()
        finally:
            process.terminate()
            process.wait(30)
    return {
        "first_paint_ms": [one[0] for one in found],
        "median_ms": statistics.median(one[0] for one in found),
        "bytes": max(one[1] for one in found),
        "requests": max(one[2] for one in found),
    }


_ARGUMENTS = ["--no-sandbox", "--disable-gpu"]


def _chromium() -> str:
    for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"):
        if Path(path).exists():
            return path
    raise RuntimeError("Chromium is not installed (Debian: apt-get install chromium)")


def _until_answers(port: int) -> None:
    import urllib.error
    import urllib.request

    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _open(browser: Any, port: int) -> tuple[float, int, int]:
    # The page allows no script but its own; Playwright's question is one.
    context = browser.new_context(bypass_csp=True)
    page = context.new_page()
    sizes: list[int] = []

    def count(request: Any) -> None:
        told = request.sizes()
        sizes.append(told["responseBodySize"] + told["responseHeadersSize"])

    page.on("requestfinished", count)
    page.goto(f"http://127.0.0.1:{port}/", wait_until="load")
    page.wait_for_function(
        "performance.getEntriesByName('first-contentful-paint').length > 0", timeout=20_000
    )
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    context.close()
    return float(painted), sum(sizes), len(sizes)
