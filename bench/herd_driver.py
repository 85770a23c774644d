"""Simulated servers that fetch a bundle at once: `bench.herd` starts a few of these.

Prints "ready", waits for a line, fetches, and prints what failed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import grpc
import uvloop

from pollard.services.common.bundle_cache import BundleCache
from pollard.services.common.bundle_source import BundleSource


async def main(address: str, digest: str, count: int, folder: Path) -> None:
    """Be `count` servers, each with a cache and a connection of its own."""
    sources = []
    channels = []
    for number in range(count):
        channel = grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        await channel.channel_ready()
        channels.append(channel)
        cache = BundleCache(folder / str(number))
        sources.append(BundleSource(cache, lambda channel=channel: channel))  # type: ignore[misc]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    done = await asyncio.gather(
        *(source.fetch(digest) for source in sources), return_exceptions=True
    )
    print(json.dumps({"failed": [str(each) for each in done if isinstance(each, BaseException)]}))
    sys.stdout.flush()
    for channel in channels:
        await channel.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
