"""Databases that a manager cannot use: each is said, with what to do, and none is changed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pollard.services.common.errors import StartupError
from pollard.services.models.database import make_database, newest_schema
from pollard.services.models.store import DATABASE, Store

MALFORMED = [
    ("not a url", "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"),
    ("postgresql://user@host:port/pollard", "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"),
    ("mysql://user:s3cret@host/pollard", "names 'mysql'; it can be postgresql://"),
    ("sqlite:///file", "names 'sqlite'"),
]


@pytest.mark.parametrize(("url", "words"), MALFORMED)
def test_a_url_that_is_none_of_postgresql_says_what_one_looks_like(
    tmp_path: Path, url: str, words: str
) -> None:
    with pytest.raises(StartupError, match=words) as refused:
        make_database(url, tmp_path, DATABASE)
    assert "s3cret" not in str(refused.value)


@pytest.fixture(scope="module")
def url(postgres: Any) -> Iterator[str]:
    """A database with the tables of this version."""
    name = postgres.new_database()
    yield postgres.url(name)
    postgres.drop_database(name)


def opened(url: str, folder: Path) -> None:
    store = Store(folder, url)
    try:
        store.open()
    finally:
        store.close()


def test_a_server_that_is_not_there_is_named_without_the_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        port = taken.getsockname()[1]
        for host, why in (("127.0.0.1", "refused"), ("nowhere.invalid", "nowhere.invalid")):
            with pytest.raises(StartupError, match="see that it runs") as refused:
                opened(f"postgresql://pollard:s3cret@{host}:{port}/pollard", tmp_path)
            assert why in str(refused.value)
            assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("/test_", "/missing_"), 'database "missing_.*does not exist'),
        (("//pollard@", "//somebody@"), 'role "somebody" does not exist'),
    ],
)
def test_a_database_or_a_role_that_is_not_there_is_named(
    url: str, tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    with pytest.raises(StartupError, match=words) as refused:
        opened(url.replace(*change), tmp_path)
    assert "--database-url" in str(refused.value)


def test_a_schema_of_a_newer_version_is_refused_and_left_alone(
    postgres: Any, tmp_path: Path
) -> None:
    name = postgres.new_database()
    try:
        opened(postgres.url(name), tmp_path)
        postgres.sql(name, "UPDATE alembic_version SET version_num = '9999'")
        before = dump(postgres, name)
        with pytest.raises(StartupError, match=r"newer version of Pollard \(schema 9999\)"):
            opened(postgres.url(name), tmp_path)
        assert dump(postgres, name) == before
    finally:
        postgres.drop_database(name)


def test_a_database_without_tables_gets_them_only_from_a_manager(
    postgres: Any, tmp_path: Path
) -> None:
    name = postgres.new_database()
    try:
        database = make_database(postgres.url(name), tmp_path, DATABASE)
        with pytest.raises(StartupError, match=newest_schema()):
            database.open(migrate=False)
        database.close()
        tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        assert postgres.sql(name, tables) == "0"
        opened(postgres.url(name), tmp_path)
        database.open(migrate=False)
        database.close()
    finally:
        postgres.drop_database(name)


def dump(postgres: Any, name: str) -> str:
    """The columns of all tables, and which schema they are said to have."""
    columns = postgres.sql(
        name,
        "SELECT table_name, column_name, data_type FROM information_schema.columns"
        " WHERE table_schema = 'public' ORDER BY 1, 2",
    )
    return str(columns + postgres.sql(name, "SELECT version_num FROM alembic_version"))
