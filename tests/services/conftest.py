"""Fixtures for tests of all services."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families


class Scraped:
    """What a service told Prometheus."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name for family in text_string_to_metric_families(text)}
        self.samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of what has the name and these labels; None if nothing has."""
        found = [
            value
            for each, given, value in self.samples
            if each == name and labels.items() <= given.items()
        ]
        return sum(found) if found else None


@pytest.fixture
def scrape() -> Callable[[str], Awaitable[Scraped]]:
    """Returns a function that reads the metrics of a service by the URL of its HTTP port."""

    async def get(url: str) -> Scraped:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
            assert answer.status == 200
            return Scraped(await answer.text())

    return get
