"""An S3 of moto's, over HTTP, that fails as told; a plugin that `tests/conftest.py` loads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass
class Reply:
    """What S3 answers in place of what it would."""

    status: int
    chunks: Iterable[bytes] = ()
    headers: dict[str, str] = field(default_factory=dict)


class S3:
    """moto's S3 on a port; `fault` may answer a request in its place, or hold it up."""

    def __init__(self) -> None:
        import boto3
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self.fault: Callable[[str, str], int | Reply | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.client = boto3.client("s3", endpoint_url=self.url)

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        method = environ["REQUEST_METHOD"]
        path = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        self.requests.append((method, path))
        told = self.fault(method, path)
        if told is None:
            return self._app(environ, start)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if isinstance(told, Reply):
            start(f"{told.status} as told", list(told.headers.items()))
            return told.chunks
        code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[told]
        start(f"{told} {code}", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()]

    def stop(self) -> None:
        self.client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3]:
    before = {key: os.environ.get(key) for key in S3_KEYS}
    os.environ.update(S3_KEYS)
    made = S3()
    yield made
    made.stop()
    for key, value in before.items():
        if value is None:
            del os.environ[key]
        else:
            os.environ[key] = value


@pytest.fixture
def s3(s3_server: S3) -> Iterator[S3]:
    """The server, in good health, with an empty bucket."""
    client = s3_server.client
    client.create_bucket(Bucket="bucket")
    s3_server.requests.clear()
    yield s3_server
    s3_server.fault = lambda method, path: None
    if "bucket" in [found["Name"] for found in client.list_buckets()["Buckets"]]:
        for upload in client.list_multipart_uploads(Bucket="bucket").get("Uploads", ()):
            client.abort_multipart_upload(
                Bucket="bucket", Key=upload["Key"], UploadId=upload["UploadId"]
            )
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
            if objects := [{"Key": found["Key"]} for found in page.get("Contents", ())]:
                client.delete_objects(Bucket="bucket", Delete={"Objects": objects})
        client.delete_bucket(Bucket="bucket")
