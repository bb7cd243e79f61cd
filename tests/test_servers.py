"""The test server itself: that it starts, dies, and comes back on its port."""

from __future__ import annotations

import pytest

from tests.servers import RedisServer, needs_redis

pytestmark = needs_redis


@pytest.mark.parametrize("durable", [True, False])
def test_a_killed_server_comes_back_on_its_port_with_what_it_kept(durable: bool) -> None:
    redis = pytest.importorskip("redis")
    with RedisServer(durable=durable) as server:
        port = server.port
        server.client().set("x", "1")
        server.kill()
        with pytest.raises(redis.ConnectionError):
            server.client().ping()
        server.restart()
        assert server.port == port
        assert server.client().get("x") == ("1" if durable else None)


def test_a_password_is_asked_for() -> None:
    redis = pytest.importorskip("redis")
    with RedisServer(password="right") as server:
        assert server.client().ping()
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(server.bare_url).ping()
