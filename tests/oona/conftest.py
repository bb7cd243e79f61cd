"""Servers for the tests of the bus."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import RedisServer


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    """One server for a module's tests that leave it as it was."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """That server, empty."""
    shared.client().flushall()
    return shared
