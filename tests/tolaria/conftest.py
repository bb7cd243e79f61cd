"""What a run warns of follows from the run, not from how busy the machine is."""

from __future__ import annotations

import math

import pytest

from esper_jax.tolaria import programs


@pytest.fixture(autouse=True)
def no_word_of_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for programs in the making are not told of; a test that is about them sets its own limit."""
    monkeypatch.setattr(programs, "TOLD_SECONDS", math.inf)
