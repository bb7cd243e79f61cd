"""A controller as a service: questions in, answers out, over HTTP. It keeps no state of any run.

    POST /v1/decide    a question; its answer                       bearer token
    GET  /v1/schema    JSON Schemas of both                         bearer token
    GET  /metrics      counts in the text format of Prometheus      bearer token
    GET  /health       who is hosted, and whether it is a mock      open

An error is `{"error": sentence}` with its status: 400 not a question, 401 no or a wrong token, 408 a body that does not
arrive, 413 too large, 422 a question that this controller cannot take, 500 the controller failed.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import hmac
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..kasmina.spec import Spec
from ..protocol import Controller
from . import packing, wire
from .wire import WireError

MAX_BYTES = 16 * 2**20
"""Bytes of a question, by default."""

BODY_SECONDS = 20.0
"""Seconds in which a question must have arrived whole."""

_log = logging.getLogger(__name__)
_BUCKETS = (0.005, 0.02, 0.1, 0.5, 2.0)
Handler = Callable[[Request], Awaitable[Response]]


class Refusal(Exception):
    """A request that gets an error: its HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Metrics:
    """Counts since the service started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._seconds = 0.0
        self._buckets = [0] * (len(_BUCKETS) + 1)
        self._started = time.time()

    def count(self, name: str, label: str = "", by: int = 1) -> None:
        """Add to a counter; `label` is ready-made: `status="200"`."""
        with self._lock:
            self._counts[name, label] += by

    def took(self, seconds: float) -> None:
        """Note how long one call of the controller took."""
        with self._lock:
            self._seconds += seconds
            self._buckets[sum(seconds > limit for limit in _BUCKETS)] += 1

    def text(self) -> str:
        """All of it in the text format of Prometheus."""
        with self._lock:
            counts, buckets, seconds = sorted(self._counts.items()), list(self._buckets), self._seconds
        lines = []
        told = set()
        for (name, label), value in counts:
            if name not in told:
                told.add(name)
                lines += [f"# HELP esper_tamiyo_{name} {_HELP[name]}", f"# TYPE esper_tamiyo_{name} counter"]
            lines.append(f"esper_tamiyo_{name}{{{label}}} {value}" if label else f"esper_tamiyo_{name} {value}")
        name = "esper_tamiyo_decide_seconds"
        lines += [f"# HELP {name} Wall time of the controller for one question.", f"# TYPE {name} histogram"]
        for limit, upto in zip((*map(str, _BUCKETS), "+Inf"), np.cumsum(buckets), strict=True):
            lines.append(f'{name}_bucket{{le="{limit}"}} {upto}')
        lines += [f"{name}_sum {seconds:.6f}", f"{name}_count {sum(buckets)}"]
        name = "esper_tamiyo_start_time_seconds"
        lines += [f"# HELP {name} When the service started.", f"# TYPE {name} gauge", f"{name} {self._started:.3f}"]
        return "\n".join(lines) + "\n"


_HELP = {
    "requests_total": "HTTP requests by path and status.",
    "decisions_total": "Decisions answered, by action.",
    "feedback_total": "Feedback received, by action and outcome.",
}


class Host:
    """One controller that answers questions; calls of it are made one at a time."""

    def __init__(self, controller: Controller, metrics: Metrics) -> None:
        self.controller, self.metrics = controller, metrics
        self.mock = bool(getattr(controller, "mock", False))
        self.kind = type(controller).__name__
        self._lock = threading.Lock()
        self._first = functools.lru_cache(maxsize=32)(self._init)

    def answer(self, body: bytes) -> bytes:
        """The answer to a question. Refusal where it is none, does not fit the controller, or the controller fails."""
        try:
            task = packing.understand(wire.decode(body, wire.Question))
        except WireError as error:
            raise Refusal(400, str(error)) from None
        with self._lock:
            try:
                first = self._first(task.spec, task.key.tobytes())
                state = first if task.leaves is None else packing.state_of(task.leaves, first)
            except Exception as error:
                raise Refusal(422, f"{self.kind} cannot take this question: {_said(error)}") from None
            began = time.perf_counter()
            try:
                decisions, state = self.controller.decide(state, task.report, task.feedback)
                answer = packing.answer(task.id, decisions, state, self.kind, self.mock)
                packing.state_of(wire.decode(answer, wire.Answer).state, first)
            except Exception as error:
                _log.exception("the controller failed at epoch %d", task.report.epoch)
                raise Refusal(500, f"the controller failed: {_said(error)}") from None
            self.metrics.took(time.perf_counter() - began)
        for decision in decisions:
            self.metrics.count("decisions_total", f'action="{decision.action}"')
        for each in task.feedback:
            self.metrics.count("feedback_total", f'action="{each.decision.action}",outcome="{each.outcome}"')
        return answer

    def _init(self, spec: Spec, key: bytes) -> Any:
        return self.controller.init(spec, np.frombuffer(key, np.uint32).copy())


def service(controller: Controller, *, token: str | None = None, max_bytes: int = MAX_BYTES) -> Starlette:
    """The ASGI application that hosts a controller.

    Args:
      controller: any controller; its state must keep the structure that its `init` gives.
      token: what `Authorization: Bearer ...` must carry; None asks for none.
      max_bytes: the largest question, in bytes.
    """
    for name in ("init", "decide"):
        if not callable(getattr(controller, name, None)):
            raise TypeError(f"controller {controller!r} has no {name}(); see esper_jax.protocol.Controller")
    metrics = Metrics()
    host = Host(controller, metrics)

    async def decide(request: Request) -> Response:
        body = await _body(request, max_bytes)
        return Response(await run_in_threadpool(host.answer, body), media_type="application/json")

    async def schema(request: Request) -> Response:
        return JSONResponse(wire.schemas())

    async def counts(request: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "controller": host.kind, "mock": host.mock, "version": wire.VERSION})

    def guarded(handler: Handler, *, is_open: bool = False) -> Handler:
        async def handle(request: Request) -> Response:
            try:
                if not is_open and token is not None:
                    _authorise(request, token)
                response = await handler(request)
            except Refusal as refusal:
                extra = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
                response = JSONResponse({"error": str(refusal)}, refusal.status, headers=extra)
            metrics.count("requests_total", f'path="{request.url.path}",status="{response.status_code}"')
            return response

        return handle

    return Starlette(
        routes=[
            Route("/v1/decide", guarded(decide), methods=["POST"]),
            Route("/v1/schema", guarded(schema), methods=["GET"]),
            Route("/metrics", guarded(counts), methods=["GET"]),
            Route("/health", guarded(health, is_open=True), methods=["GET"]),
        ]
    )


def _authorise(request: Request, token: str) -> None:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if not given:
        raise Refusal(401, "this service asks for a bearer token and got none")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise Refusal(401, "the bearer token is wrong")


async def _body(request: Request, max_bytes: int) -> bytes:
    """The whole body, read no further than `max_bytes`."""
    too_large = Refusal(413, f"the question is larger than {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except TimeoutError:
        raise Refusal(408, f"the question did not arrive within {BODY_SECONDS:g} seconds") from None
    except ClientDisconnect:
        raise Refusal(400, "the client went away before its question had arrived") from None


def _said(error: Exception) -> str:
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    return wire.printable(f"{type(error).__name__}: {said}")[:1000]
