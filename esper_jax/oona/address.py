"""Where the bus is: a URL with a few settings of ours in its query, and the client that it opens."""

from __future__ import annotations

import dataclasses
import importlib
import math
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
        `timeout` may stand in its query. A password that is not in it is taken from the variable REDISCLI_AUTH; one
        that is in it is taken out of `url` and kept apart, so that no message and no file shows it.
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
    username: str | None = None
    secrets: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)
    """Passwords from the URL, by the names that redis gives them."""

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
        parts = _split(given)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        own = {name: query.pop(name) for name in ("run", "maxlen", "timeout") if name in query}
        rest = urllib.parse.urlunsplit(parts._replace(query=urllib.parse.urlencode(query)))
        try:
            maxlen, timeout = int(own.get("maxlen", 100_000)), float(own.get("timeout", 5.0))
        except ValueError:
            raise ValueError("maxlen and timeout in the URL of the bus must be numbers") from None
        return Address(rest, own.get("run"), maxlen, timeout)

    def __post_init__(self) -> None:
        parts = _split(self.url)
        query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
        kept = [(name, value) for name, value in query if name != "username" and not _secret(name)]
        secrets = [(name, value) for name, value in query if _secret(name)]
        if parts.password:
            secrets.append(("password", urllib.parse.unquote(parts.password)))
        named = dict(query).get("username")
        username = urllib.parse.unquote(parts.username) if parts.username else named
        host = parts.netloc.rpartition("@")[2]
        bare = urllib.parse.urlunsplit(parts._replace(netloc=host, query=urllib.parse.urlencode(kept)))
        object.__setattr__(self, "url", bare)
        object.__setattr__(self, "username", username or self.username)
        object.__setattr__(self, "secrets", tuple(secrets) or self.secrets)
        if self.run is not None and not _NAME.fullmatch(self.run):
            raise ValueError(f"a run's name has letters, digits and _.- only, at most 200, got {self.run!r}")
        if not 1 <= self.maxlen < 1 << 62:
            raise ValueError(f"maxlen must be 1 or more (and below 2**62), got {self.maxlen}")
        if not 0 < self.timeout <= 3600 or not math.isfinite(self.timeout):
            raise ValueError(f"timeout must be above 0 and at most 3600 seconds, got {self.timeout}")

    @property
    def shown(self) -> str:
        """The URL without the password, for messages."""
        if not self.username and not self.secrets:
            return self.url
        return self._with((self._open_name or ("" if self.secrets else "***")) + ":***" * bool(self.secrets))

    @property
    def bare(self) -> str:
        """The URL without the password, as a configuration file may hold it."""
        url = self._with(self._open_name) if self._open_name else self.url
        own = {"run": self.run, "maxlen": self.maxlen, "timeout": self.timeout}
        default = {"run": None, "maxlen": 100_000, "timeout": 5.0}
        query = urllib.parse.urlencode({key: value for key, value in own.items() if value != default[key]})
        return url + ("&" if "?" in url else "?") * bool(query) + query

    @property
    def _open_name(self) -> str:
        """The user's name, where a password says that it is one; alone it may be a token."""
        known = self.secrets or os.environ.get("REDISCLI_AUTH")
        return urllib.parse.quote(self.username, safe="") if self.username and known else ""

    def _with(self, user: str) -> str:
        parts = urllib.parse.urlsplit(self.url)
        return urllib.parse.urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc}"))

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
        options |= {"username": self.username} if self.username else {}
        password = os.environ.get("REDISCLI_AUTH")
        options |= {"password": password} if password else {}
        options |= dict(self.secrets)
        try:
            client = redis.Redis.from_url(self.url, **options)
            client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)  # connects nowhere
        except (ValueError, TypeError, AttributeError, redis.RedisError) as error:
            said = self.said(error)
            raise OonaError(f"redis does not understand the URL {self.shown!r}: {said}", transient=False) from None
        return client

    def said(self, error: BaseException | None) -> str:
        """An error for people, without passwords, whoever wrote its text."""
        text = describe(error)
        lone = [self.username] if self.username and not self._open_name else []
        for secret in [*dict(self.secrets).values(), os.environ.get("REDISCLI_AUTH"), *lone]:
            text = text.replace(secret, "***") if secret else text
        return text

    def trouble(self, error: Exception) -> OonaError:
        """What went wrong there, for people."""
        if isinstance(error, OonaError):
            return error
        kind = type(error).__name__
        what = (
            "refuses" if kind in ("AuthenticationError", "AuthorizationError", "NoPermissionError") else "cannot serve"
        )
        hint = ""
        if kind in ("AuthenticationError", "AuthorizationError"):
            hint = " (give the password in the URL or in the variable REDISCLI_AUTH; a run directory never keeps it)"
        if classify(error) == "transient" and kind != "OutOfMemoryError":
            what = "does not answer"
        return OonaError(f"{self.shown} {what}: {self.said(error)}{hint}", transient=classify(error) == "transient")

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


def _split(url: str) -> urllib.parse.SplitResult:
    """The parts of a URL of ours; ValueError, without a part of it in its text, for any other."""
    wanted = "oona must be a URL such as 'redis://localhost:6379/0' (or rediss://, unix://)"
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port, parts.hostname
    except ValueError:  # which quotes what may be a password
        raise ValueError(f"{wanted}; in a password / ? # @ and : are written %2F %3F %23 %40 and %3A") from None
    if parts.scheme not in _SCHEMES or "://" not in url or not (parts.netloc or parts.path):
        raise ValueError(f"{wanted}, got {'another scheme' if '://' in url else 'something else'}")
    if parts.fragment or any("@" in part for part in parts[2:]):
        raise ValueError(f"{wanted}; in a password / ? # and @ are written %2F %3F %23 and %40")
    return parts


def _secret(name: str) -> bool:
    return "password" in name.lower()
