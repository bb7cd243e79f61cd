"""HTTP connections that are hung up on when no whole request comes: idle ones would take the places of others."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 10.0
"""Seconds that a client has for a whole request, its body included; an answer may take longer."""


class Patient(H11Protocol):
    """uvicorn's protocol, which has a time limit between two requests but none for the first or for a slow one."""

    patience = PATIENCE

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._answered = self._seen = 0
        self._look: asyncio.TimerHandle | None = self.loop.call_later(self.patience, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """One request was answered."""
        self._answered += 1
        super().on_response_complete()

    def _hang_up(self) -> None:
        """Close the connection unless the last `patience` seconds saw an answer, or one is being made now."""
        cycle = self.cycle
        working = cycle is not None and not cycle.response_complete and not cycle.more_body
        if not working and self._answered == self._seen:
            self.transport.close()
            return
        self._seen = self._answered
        self._look = self.loop.call_later(self.patience, self._hang_up)
