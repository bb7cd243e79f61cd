"""Where the bus is: a URL with a few settings of ours in its query, and the client that it opens."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import urllib.parse
from typing import Any

from ..recovery import classify, describe

RUNS = "esper:runs"
"""A sorted set of run names by the time they last published."""
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
_SCHEMES = ("redis", "rediss", "unix")


class OonaError(RuntimeError):
    """The bus cannot be used, in one sentence. `transient` says whether it may work later as it stands."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


@dataclasses.dataclass(frozen=True)
class Address:
    """A Redis server, and one run's stream on it.

    Args:
      url: `redis://[user[:password]@]host[:port][/db]`, `rediss://` (TLS) or `unix://path`. `run`, `maxlen` and
        `timeout` may stand in its query. A password that is not in it is taken from the variable REDISCLI_AUTH.
      run: the run's name, letters, digits and `_.-`; None lets the run choose, and means the newest to readers.
      maxlen: events that the stream keeps, at least (Redis trims it in blocks).
      timeout: seconds for one answer of the server.

    >>> Address.of("redis://:secret@example.org/0?run=digits-0")
    Address('redis://:***@example.org/0', run='digits-0')
    """

    url: str
    run: str | None = None
    maxlen: int = 100_000
    timeout: float = 5.0

    @staticmethod
    def of(given: str | Address) -> Address:
        """The address as given, or read from a URL.

        Raises:
          ValueError: it is no such URL, in a sentence that does not show the password.
        """
        if isinstance(given, Address):
            return given
        if not isinstance(given, str):
            raise TypeError(f"oona must be a URL such as 'redis://localhost:6379/0', got {type(given).__name__}")
        parts = urllib.parse.urlsplit(given)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        own = {name: query.pop(name) for name in ("run", "maxlen", "timeout") if name in query}
        rest = urllib.parse.urlunsplit(parts._replace(query=urllib.parse.urlencode(query)))
        try:
            maxlen, timeout = int(own.get("maxlen", 100_000)), float(own.get("timeout", 5.0))
        except ValueError as error:
            raise ValueError(f"maxlen and timeout in {_hidden(given)} must be numbers") from error
        return Address(rest, own.get("run"), maxlen, timeout)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in _SCHEMES or not (parts.netloc or parts.path):
            raise ValueError(
                f"oona must be a URL such as 'redis://localhost:6379/0' (or rediss://, unix://), got {self.shown!r}"
            )
        if self.run is not None and not _NAME.fullmatch(self.run):
            raise ValueError(f"a run's name has letters, digits and _.- only, at most 200, got {self.run!r}")
        if self.maxlen < 1 or not self.timeout > 0:
            raise ValueError(f"maxlen must be 1 or more and timeout above 0, got {self.maxlen} and {self.timeout}")

    @property
    def shown(self) -> str:
        """The URL without the password, for messages."""
        return _hidden(self.url)

    @property
    def bare(self) -> str:
        """The URL without the password, as a configuration file may hold it."""
        parts = urllib.parse.urlsplit(self.url)
        user, at, host = parts.netloc.rpartition("@")
        name = user.partition(":")[0]
        url = urllib.parse.urlunsplit(parts._replace(netloc=f"{name}@{host}" if at and name else host))
        own = {"run": self.run, "maxlen": self.maxlen, "timeout": self.timeout}
        default = {"run": None, "maxlen": 100_000, "timeout": 5.0}
        query = urllib.parse.urlencode({key: value for key, value in own.items() if value != default[key]})
        return url + ("&" if parts.query else "?") * bool(query) + query

    @property
    def stream(self) -> str:
        """The key of the run's stream."""
        return f"esper:run:{self.run}"

    def client(self) -> Any:
        """A `redis.Redis` that answers in bytes and never tries again by itself.

        Raises:
          OonaError: the package is missing, or refuses the URL.
        """
        redis = package()
        backoff, retry = importlib.import_module("redis.backoff"), importlib.import_module("redis.retry")
        options: dict[str, Any] = {
            "socket_timeout": self.timeout,
            "socket_connect_timeout": self.timeout,
            "retry": retry.Retry(backoff.NoBackoff(), 0),
            "protocol": 2,
        }
        password = os.environ.get("REDISCLI_AUTH")
        if password and urllib.parse.urlsplit(self.url).password is None:
            options["password"] = password
        try:
            return redis.Redis.from_url(self.url, **options)
        except ValueError as error:
            raise OonaError(f"redis does not understand the URL {self.shown!r}: {error}", transient=False) from error

    def trouble(self, error: Exception) -> OonaError:
        """What went wrong there, for people."""
        if isinstance(error, OonaError):
            return error
        kind = type(error).__name__
        what = (
            "refuses" if kind in ("AuthenticationError", "AuthorizationError", "NoPermissionError") else "cannot serve"
        )
        hint = " (a password may also stand in the variable REDISCLI_AUTH)" if kind == "AuthenticationError" else ""
        if classify(error) == "transient" and kind != "OutOfMemoryError":
            what = "does not answer"
        return OonaError(f"{self.shown} {what}: {describe(error)}{hint}", transient=classify(error) == "transient")

    def __repr__(self) -> str:
        return f"Address({self.shown!r}, run={self.run!r})"


def package() -> Any:
    """The module `redis`.

    Raises:
      OonaError: it is not installed.
    """
    try:
        importlib.import_module("tenacity")
        return importlib.import_module("redis")
    except ImportError as error:
        raise OonaError(
            f'a bus needs the package {error.name or "redis"}, which is not installed: pip install "esper_jax[redis]", '
            "or leave oona= out",
            transient=False,
        ) from error


def runs(given: str | Address) -> list[str]:
    """The runs that have published on that server, the most recently active first.

    Raises:
      OonaError: the server cannot be asked.
    """
    address = Address.of(given)
    client = address.client()
    try:
        return [name.decode() for name in client.zrevrange(RUNS, 0, -1)]
    except package().RedisError as error:
        raise address.trouble(error) from error
    finally:
        client.close()


def _hidden(url: str) -> str:
    return re.sub(r"(?<=://)([^:@/]*):[^@/]*@", r"\1:***@", url)
