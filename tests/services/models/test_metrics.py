"""What a manager tells Prometheus, held against what happened to it."""

from __future__ import annotations

import asyncio
from typing import Any

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb

ONE = {"model": "m", "version": "1"}


async def test_registry_aliases_and_fleet_are_told_and_forgotten(
    suite: Any, bundles: Any, helpers: Any, scrape: Any
) -> None:
    server = await suite.join("infer-1")
    url = suite.service.http.url
    scraped = await scrape(url)
    assert scraped.value("pollard_manager_leads") == 1
    assert scraped.value("pollard_registry_models") == 0
    assert scraped.value("pollard_fleet_servers", kind="inference", connected="true") == 1
    await suite.client.push(helpers.packed(bundles.make(1)))
    await suite.client.set_alias(1)
    await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
    server.report(("m", 1, fleet_pb.REVISION_STATE_READY))

    scraped = await helpers.eventually(
        lambda: scrape(url),
        lambda found: found.value("pollard_fleet_revision_servers", state="ready", **ONE) == 1,
    )
    assert scraped.value("pollard_alias_revision", model="m", alias="production") == 1
    assert scraped.value("pollard_alias_failed", model="m") == 0
    assert scraped.value("pollard_registry_revisions") == 1
    assert scraped.value("pollard_registry_bundle_bytes") > 0
    pushed = {"grpc_method": "UploadBundle", "grpc_type": "client_stream"}
    assert scraped.value("grpc_server_handled_total", grpc_code="OK", **pushed) == 1
    # A stream that is open has begun and not ended.
    sync = {"grpc_method": "Sync", "grpc_type": "bidi_stream"}
    assert scraped.value("grpc_server_started_total", **sync) == 1
    assert scraped.value("grpc_server_handled_total", **sync) is None

    await suite.client.models.DeleteModel(pb.DeleteModelRequest(name="models/m", force=True))
    scraped = await scrape(url)
    assert scraped.value("pollard_alias_revision", model="m") is None
    assert scraped.value("pollard_registry_models") == 0


async def test_a_database_that_keeps_silent_holds_up_no_scrape(
    suite_with: Any, postgres: Any, scrape: Any
) -> None:
    import psycopg

    url = postgres.url(postgres.new_database())
    async with suite_with(database_url=url) as suite:
        scraped = await scrape(suite.service.http.url)
        assert scraped.value("pollard_registry_up") == 1
        with psycopg.connect(url) as other:
            other.execute("LOCK TABLE models IN ACCESS EXCLUSIVE MODE")
            async with asyncio.timeout(20):
                silent = await scrape(suite.service.http.url)
            assert silent.value("pollard_registry_up") == 0
            assert silent.value("pollard_registry_models") is None
            assert silent.value("pollard_manager_leads") == 1
        again = await scrape(suite.service.http.url)
        assert again.value("pollard_registry_up") == 1
        assert again.value("pollard_registry_models") == 0
