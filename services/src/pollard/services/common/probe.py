"""One health check of a server, for containers and service managers."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.client._channel import channel_credentials, checked_address
from pollard.client.environment import connection


def probe(address: str, *, service: str = "", timeout_seconds: float = 5.0) -> tuple[bool, str]:
    """Ask a server once whether it takes requests.

    Args:
        address: HOST:PORT, or unix:/PATH.
        service: Full name of one of its services; empty for the server.
        timeout_seconds: Longest wait for the connection and the answer.

    Returns:
        Whether it says SERVING, and words for people.

    Raises:
        ValueError: the address is none, or the environment's TLS settings do not fit together.
        OSError: a certificate cannot be read.
    """
    target = checked_address(address)
    # Without its token: health is open, and a token would be shown to whoever listens there.
    credentials = channel_credentials(connection()["tls"], None, target)
    options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
    channel = (
        grpc.insecure_channel(target, options=options)
        if credentials is None
        else grpc.secure_channel(target, credentials, options=options)
    )
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return False, f"{address} knows no service {service!r}"
            return False, f"{address}: {error.code().name}: {error.details()}"
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return answer.status == health_pb2.HealthCheckResponse.SERVING, name
