"""A controller that decides by a script, for tests of what is around a controller. It measures and judges nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..kasmina.spec import Spec
from ..protocol import Decision, Feedback, Report


@dataclasses.dataclass(frozen=True)
class MockController:
    """Plays decisions by a script: for tests only, and nothing in the library ever chooses it.

    A service that hosts it marks each of its answers, and `TamiyoClient` refuses those unless `allow_mock=True`.

    Args:
      script: `{epoch: [Decision or its fields as a mapping, ...]}`, played at the first report of that epoch or later.

    >>> MockController({3: [{"action": "germinate", "site": "Dense_0", "blueprint": "lora"}]}).mock
    True
    """

    script: Mapping[int, Sequence[Any]] = dataclasses.field(default_factory=dict, hash=False)
    mock = True

    def __post_init__(self) -> None:
        script = {}
        for epoch, entries in self.script.items():
            try:
                lines = [entry if isinstance(entry, Decision) else Decision(**entry) for entry in entries]
            except TypeError as error:
                raise ValueError(f"epoch {epoch} of the script: {error}") from None
            script[int(epoch)] = tuple(lines)
        object.__setattr__(self, "script", script)

    def init(self, spec: Spec, key: Any = None) -> dict[str, Any]:
        """The first state: nothing was played. Neither `spec` nor `key` is used."""
        return {"played": np.array(-1, np.int32)}

    def decide(
        self, state: dict[str, Any], report: Report, feedback: tuple[Feedback, ...] = ()
    ) -> tuple[tuple[Decision, ...], dict[str, Any]]:
        """The script's decisions for the epochs since the last report, and the next state."""
        due = [epoch for epoch in sorted(self.script) if int(state["played"]) < epoch <= report.epoch]
        decisions = tuple(decision for epoch in due for decision in self.script[epoch])
        return decisions, {"played": np.array(report.epoch, np.int32)}
