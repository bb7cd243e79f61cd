"""`esper-jax tamiyo ...`: what the command line knows of Tamiyo. Needs tyro; only the command line imports it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tyro

from .serve import Serve


@dataclasses.dataclass(frozen=True)
class TamiyoCommand:
    """Tamiyo, control: `esper-jax tamiyo serve` hosts a controller as a service that runs ask with TamiyoClient."""

    what: tyro.conf.Positional[Literal["serve"]]
    """serve: answer questions until told to end."""
    options: Serve

    def run(self) -> None:
        """Do what was asked."""
        self.options.run()
