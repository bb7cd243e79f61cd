"""Torch draws the same numbers for a test whatever ran before it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _seeded_for_fixtures() -> None:
    _seed()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    _seed()


def _seed() -> None:
    try:
        import torch
    except ImportError:  # those tests are left out
        return
    torch.manual_seed(0)
