"""One turn of a client at one tick: state unpacked, a question asked or an answer used, and the state packed again."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import msgspec
import numpy as np

from ..kasmina.spec import Spec
from ..protocol import REMOTE, Decision, Feedback, Notice, Report
from . import packing, wire
from .mail import Mail, Reply
from .remote import RemoteState, pack, unpack

MAX_OWED = 256
"""Feedback kept for a service that does not answer; the oldest is dropped beyond it."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What does not change from turn to turn; see `TamiyoClient`."""

    url: str
    lag: int
    max_parameters: int
    allow_mock: bool


class _When(msgspec.Struct):
    epoch: int
    step: int


class _Asked(msgspec.Struct):
    """What a turn needs to know of its own question."""

    id: str
    report: _When
    feedback: list[msgspec.Raw]


class Turn:
    """One call of `decide`, step by step; `decisions` and `notices` are what came of it."""

    def __init__(self, setting: Setting, mail: Mail, state: RemoteState, feedback: tuple[Feedback, ...]) -> None:
        self.setting, self.mail, self._before = setting, mail, state
        self.question, self.remote = unpack(state.question), unpack(state.remote)
        self.spec = _spec(unpack(state.spec))
        owed = wire.decode_all(unpack(state.owed), wire.FeedbackLine)
        self.owed = [*owed, *packing.feedback_lines(feedback)][-MAX_OWED:]
        self.waited, self.missed = int(state.waited) + 1, int(state.missed)
        self.decisions: tuple[Decision, ...] = ()
        self.notices: list[Notice] = []

    def ask(self, report: Report) -> None:
        """Post a question about this report."""
        leaves = wire.decode_all(self.remote, wire.Leaf) if self.remote else None
        name, self.question = packing.ask(self.spec, self._before.key, leaves, report, self.owed)
        self.waited = 0
        self._post(name)

    def settle(self) -> None:
        """Use the answer to the question, or do without one."""
        asked = msgspec.json.decode(self.question, type=_Asked)
        reply = self.mail.take(asked.id, 0.0 if self.setting.lag else self.mail.timeout)
        if reply is None:  # asked before a resume: the answer went to a process that is gone
            self._post(asked.id)
            reply = self.mail.take(asked.id, self.mail.timeout)
        assert reply is not None
        when = {"asked_epoch": asked.report.epoch, "asked_step": asked.report.step}
        self.question = b""
        if reply.answer is None:
            self._go_without(reply, when)
            return
        self.decisions = tuple(map(packing.decision, reply.answer.decisions))
        self.remote = wire.encode(reply.answer.state)
        self.owed = self.owed[len(asked.feedback) :]
        if self.missed:
            text = f"{self._service} answers again; {self.missed} answer(s) were missed"
            self._say("recovery", text, missed=self.missed, seconds=self.mail.since_lost())
        self.missed = 0
        what = "; ".join(map(str, self.decisions)) or "no decisions"
        told = {"controller": wire.printable(reply.answer.controller), "mock": reply.answer.mock}
        lines = [{name: getattr(each, name) for name in _FIELDS} for each in self.decisions]
        self._say("answer", f"answered: {what}", **when, **told, decisions=lines, seconds=reply.seconds)

    def state(self) -> RemoteState:
        """The state after this turn."""
        return RemoteState(
            spec=self._before.spec,
            key=self._before.key,
            remote=pack(self.remote),
            question=pack(self.question),
            owed=pack(wire.encode(self.owed) if self.owed else b""),
            waited=np.array(self.waited, np.int32),
            missed=np.array(self.missed, np.int32),
        )

    def _go_without(self, reply: Reply, when: dict[str, Any]) -> None:
        self.missed += 1
        if self.missed == 1:
            self.mail.lose()
            why = reply.reason or f"none had come after {self._deadline}, and a larger one gives it more time"
            text = f"{self._service} gave no answer that can be used: {why}. Training goes on without decisions."
            self._say("outage", text, **when, error=why)

    def _post(self, name: str) -> None:
        self.mail.post(name, self.question, functools.partial(_check, self.setting, name, self.spec))

    def _say(self, kind: str, message: str, **data: Any) -> None:
        self.notices.append(Notice(kind, message, {"service": self._service, **data}))

    @property
    def _deadline(self) -> str:
        lag = self.setting.lag
        return f"a lag of {lag} tick(s)" if lag else f"a timeout of {self.mail.timeout:g} s"

    @property
    def _service(self) -> str:
        return f"{REMOTE}{self.setting.url}"


_FIELDS = tuple(field.name for field in dataclasses.fields(Decision))


def _check(setting: Setting, question: str, spec: Spec, data: bytes) -> wire.Answer:
    answer = packing.verified(data, question, spec, setting.max_parameters)
    if answer.mock and not setting.allow_mock:
        raise wire.WireError(
            "the service hosts a mock, which decides by a script: host a controller, or pass allow_mock=True in a test"
        )
    return answer


@functools.lru_cache(maxsize=8)
def _spec(text: bytes) -> Spec:
    return Spec.from_json(text.decode())
