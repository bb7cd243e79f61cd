"""`esper-jax tamiyo serve`: a controller behind a port, from the command line."""

from __future__ import annotations

import dataclasses
import importlib
import ipaddress
import json
import os
import pathlib
import socket
import sys
from collections.abc import Sequence
from typing import Any

from ..kasmina.gates import Gates
from ..protocol import Controller
from .client import TOKEN, check_token
from .heuristic import Tamiyo
from .mock import MockController
from .schedules import FixedSchedule, RandomSchedule

CONTROLLERS: dict[str, Any] = {
    "tamiyo": Tamiyo,
    "fixed": FixedSchedule,
    "random": RandomSchedule,
    "mock": MockController,
}


def serve(
    controller: Controller, *, host: str = "127.0.0.1", port: int = 8700, token: str | None = None, max_bytes: int
) -> None:
    """Host a controller until the process is told to end (Ctrl-C or SIGTERM).

    Args:
      controller: what decides.
      host: the address to listen on.
      port: 0 takes a free one. The address is printed once the service answers.
      token: the bearer token; None only on the loopback interface.
      max_bytes: the largest question.

    Raises:
      ValueError: no token on an address that others can reach, or one that cannot be listened on.
      ImportError: the packages of `esper_jax[service]` are missing.
    """
    try:
        import uvicorn

        from .patience import Patient
        from .server import service
    except ImportError as error:
        raise ImportError(
            f'the service needs the package {error.name}, which is not installed: pip install "esper_jax[service]"'
        ) from error
    check_token(token)
    if token is None and not _loopback(host):
        raise ValueError(
            f"{host} can be reached by others, so a bearer token is needed: set {TOKEN}, or listen on 127.0.0.1"
        )
    app = service(controller, token=token, max_bytes=max_bytes)
    listener = _listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            kind = "a MOCK controller" if getattr(controller, "mock", False) else type(controller).__name__
            print(f"tamiyo: {kind} listens on {address}", flush=True)  # noqa: T201

    config = uvicorn.Config(
        app,
        http=Patient,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=5,
    )
    Server(config).run([listener])


def make_controller(name: str, settings: Sequence[str] = ()) -> Controller:
    """The controller `name`: one of `CONTROLLERS`, or `module:attribute`.

    Args:
      name: a class or function is called with the settings; any other attribute is taken as it is, without settings.
      settings: `key=value` each, the value as JSON or, where it is none, as text; `gates.strict=true` sets one gate.

    Raises:
      ValueError: an unknown name or setting, or a value that the controller refuses, in one sentence.
    """
    options: dict[str, Any] = {}
    gates: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"a setting is key=value, got {setting!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        (gates if key.startswith("gates.") else options)[key.removeprefix("gates.")] = _frozen(value)
    made = CONTROLLERS.get(name) or _attribute(name)
    try:
        if gates:
            options["gates"] = Gates(**gates)
        if made is FixedSchedule and isinstance(options.get("plan"), dict):
            options["plan"] = {int(epoch): entries for epoch, entries in options["plan"].items()}
        if callable(made) and not callable(getattr(made, "decide", None)) or isinstance(made, type):
            return made(**options)
    except Exception as error:  # a controller's own code: whatever it does not like
        said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__
        raise ValueError(f"controller {name} cannot be made: {said}") from None
    if options:
        raise ValueError(f"{name} is a ready-made object and takes no settings, got {', '.join(settings)}")
    return made


def _attribute(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise ValueError(
            f"there is no controller {name!r}; choose from {', '.join(CONTROLLERS)} or give module:attribute"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"controller {name!r} cannot be loaded: {error}") from None
    except Exception as error:  # the module's own code, or what is no name of a module
        raise ValueError(f"controller {name!r} cannot be loaded: {type(error).__name__}: {error}") from None
    return found


def _frozen(value: Any) -> Any:
    """Lists as tuples, since the controllers' fields are tuples."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}") from None
    return listener


def read_token(path: pathlib.Path | None) -> str | None:
    """The bearer token: of the file if one is named, else of the environment variable, else None."""
    if path is None:
        return os.environ.get(TOKEN)
    try:
        return path.read_text().strip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"the token file {path} cannot be read: {getattr(error, 'strerror', error)}") from None


@dataclasses.dataclass(frozen=True)
class Serve:
    """Host a controller as a service that runs ask with TamiyoClient.

    The bearer token is read from --token-file or the environment variable ESPER_TAMIYO_TOKEN; without one the service
    listens on the loopback interface only. Paths: /v1/decide, /v1/schema, /health, /metrics.
    """

    controller: str = "tamiyo"
    """tamiyo, fixed, random, mock (plays a script, for tests), or module:attribute."""
    set: tuple[str, ...] = ()
    """Settings of the controller, e.g. plateau=2 'blueprints=["mlp","lora"]' gates.strict=true
    'plan={"10": [["Dense_0", "lora", {"rank": 4}]]}'."""
    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = 8700
    """The port; 0 takes a free one, which is printed."""
    token_file: pathlib.Path | None = None
    """A file that holds the bearer token."""
    max_bytes: int = 16 * 2**20
    """The largest question, in bytes."""

    def run(self) -> None:
        """Serve until told to end."""
        if self.max_bytes < 1:
            raise ValueError(f"--max-bytes must be 1 or more, got {self.max_bytes}")
        controller = make_controller(self.controller, self.set)
        serve(controller, host=self.host, port=self.port, token=read_token(self.token_file), max_bytes=self.max_bytes)
