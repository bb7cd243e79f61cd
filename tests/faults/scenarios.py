"""What can go wrong around a growing run, as functions: tests run a short form of each, a benchmark the full one.

Each takes a folder of its own, a generator of random numbers and a number of trials, and returns a `Found`. A scenario
fails by naming what went wrong in `Found.failures`, never by ending early.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.disk import all_damaged, damaged, disk_full, donated, killed
from tests.faults.found import Found
from tests.faults.numbers import after_fossilisation, broken_blueprints, not_finite, rogue_controllers, soak
from tests.faults.services import bus, tampered

SCENARIOS: dict[str, tuple[Callable[..., Found], int, int]] = {
    "killed": (killed, 100, 2),
    "damaged": (damaged, 10_000, 6),
    "all_damaged": (all_damaged, 1, 1),
    "disk_full": (disk_full, 5, 1),
    "donated": (donated, 50, 10),
    "not_finite": (not_finite, 1, 1),
    "after_fossilisation": (after_fossilisation, 1, 1),
    "rogue_controllers": (rogue_controllers, 1, 1),
    "broken_blueprints": (broken_blueprints, 1, 1),
    "bus": (bus, 12, 4),
    "tampered": (tampered, 10_000, 3),
    "soak": (soak, 300, 16),
}
"""By name: the scenario, its trials in full, and in short."""
