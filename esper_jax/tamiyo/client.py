"""A controller that asks a service. Training never waits for it, and what the service does can never stop a run."""

from __future__ import annotations

import re
from typing import Any

from .._checks import flag, one_of, seconds, whole
from ..kasmina.spec import Spec
from ..protocol import Decision, Feedback, Notice, Report
from ..recovery import Breaker
from .remote import RemoteState

TOKEN = "ESPER_TAMIYO_TOKEN"
"""The environment variable with the bearer token, for the service and on the command line."""


def check_token(token: str | None) -> None:
    """ValueError, without the token, for a bearer token that a header cannot carry as it is (RFC 6750)."""
    if token is not None and not (isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token)):
        raise ValueError("the bearer token must be printable ASCII without spaces and not empty")


class TamiyoClient:
    """Asks the controller behind a URL (`esper-jax tamiyo serve`) when, where and what to grow.

    A question is posted in the background at a tick, and its answer applied `lag` ticks later. An answer that is not
    there by then, or that is not exactly an answer, means no decisions: the run goes on, one notice tells of the outage
    and one of its end. While decisions wait for their feedback no further question is asked, so the controller never
    decides without knowing what became of its last decisions. Each answer used is in the run's log; `ReplayController`
    repeats a run from it.

    Args:
      url: `http://host:port` or `https://host:port`.
      token: the service's bearer token; None sends none.
      lag: ticks from a question to the use of its answer, 1 or more; 0 waits for the answer at the tick, up to
        `timeout`, so that a remote controller decides exactly as the same one at home would.
      timeout: seconds for a question, all attempts together. After a resume the question under way is asked again and
        waited for that long, once.
      attempts: tries for a question whose failure may pass, with growing, partly random pauses.
      max_bytes: the largest answer that is read.
      max_parameters: the largest seed, in parameters, that an answer may germinate.
      failures, cooldown, max_cooldown: after so many failed questions in a row none is sent for `cooldown` seconds,
        doubled with each failed trial up to `max_cooldown`.
      allow_mock: accept the answers of a service that hosts a mock.

    >>> TamiyoClient("http://127.0.0.1:8700", lag=2)
    TamiyoClient('http://127.0.0.1:8700', lag=2)
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        lag: int = 1,
        timeout: float = 10.0,
        attempts: int = 3,
        max_bytes: int = 4 * 2**20,
        max_parameters: int = 10_000_000,
        failures: int = 3,
        cooldown: float = 1.0,
        max_cooldown: float = 30.0,
        allow_mock: bool = False,
    ) -> None:
        try:
            import tenacity  # noqa: F401

            from . import mail, turn
        except ImportError as error:
            raise ImportError(
                f'TamiyoClient needs the package {error.name}, which is not installed: pip install "esper_jax[service]"'
            ) from error
        one_of("url", url, str, '"http://host:port"')
        counts = {"attempts": attempts, "max_bytes": max_bytes, "max_parameters": max_parameters, "failures": failures}
        for name, count in counts.items():
            whole(name, count, 1)
        whole("lag", lag, 0)
        seconds("timeout", timeout)
        for name, pause in (("cooldown", cooldown), ("max_cooldown", max_cooldown)):
            seconds(name, pause, zero=True)
        flag("allow_mock", allow_mock)
        check_token(token)
        self.url, self.lag = url, lag
        self.setting = turn.Setting(url, lag, max_parameters, allow_mock)
        self._turn = turn.Turn
        self._breaker = Breaker(
            "the service", failures=failures, cooldown=cooldown, max_cooldown=max(cooldown, max_cooldown)
        )
        self._mail = mail.Mail(
            url, token=token, timeout=timeout, max_bytes=max_bytes, attempts=attempts, breaker=self._breaker
        )
        self._notices: list[Notice] = []

    def init(self, spec: Spec, key: Any) -> RemoteState:
        """The first state; the service is not asked yet, and need not be there."""
        return RemoteState.first(spec, key)

    def decide(
        self, state: RemoteState, report: Report, feedback: tuple[Feedback, ...] = ()
    ) -> tuple[tuple[Decision, ...], RemoteState]:
        """Decisions of the answer that is due, and the next state. Never raises for what a service does."""
        turn = self._turn(self.setting, self._mail, state, feedback)
        if turn.question and turn.waited >= self.lag:
            turn.settle()
        if not turn.question and not turn.decisions:
            turn.ask(report)
            if self.lag == 0:
                turn.settle()
        self._notices += turn.notices
        return turn.decisions, turn.state()

    def notices(self) -> tuple[Notice, ...]:
        """What there is to say since the last call: answers used, outages and their ends."""
        told, self._notices = tuple(self._notices), []
        return told

    def settle(self, seconds: float) -> bool:
        """Wait until no question is under way, so many seconds at most; whether that is so. Training never does."""
        return self._mail.settle(seconds)

    def __repr__(self) -> str:
        return f"TamiyoClient({self.url!r}, lag={self.lag})"
