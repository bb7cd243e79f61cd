"""What can go wrong around a growing run, as functions: tests run a short form of each, a benchmark the full one.

Each takes a folder of its own, a generator of random numbers and a number of trials, and returns a `Found`. A scenario
fails by naming what went wrong in `Found.failures`, never by ending early.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.disk import all_damaged, damaged, disk_full, donated, killed
from tests.faults.found import Found
from tests.faults.numbers import after_fossilisation, broken_blueprints, not_finite, rogue_controllers
from tests.faults.services import bus, tampered
from tests.faults.soaking import soak

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
TESTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "misfits": (
        "Restore with a missing, extra, reshaped or recast leaf, or of other versions: an error that names it.",
        (
            "tests/test_checkpoint.py::test_missing_extra_reshaped_and_recast_leaves_are_four_errors_naming_the_path",
            "tests/test_checkpoint.py::test_a_step_of_other_versions_that_does_not_fit_says_which_wrote_it",
            "tests/tolaria/test_versions.py",
        ),
    ),
    "signals": (
        "SIGTERM and Ctrl-C in mid-epoch, in a wait for a program, before and after training.",
        (
            "tests/tolaria/test_resume.py::test_a_signal_in_mid_epoch_saves_and_the_resumed_run_ends_the_same",
            "tests/faults/test_signals.py",
        ),
    ),
    "directories": (
        "A directory that another run holds, that may only be read, or whose disk is full.",
        ("tests/faults/test_preemption.py",),
    ),
    "values": (
        "Hostile values of options, in configuration files and of arguments.",
        ("tests/faults/test_input.py", "tests/faults/test_commands.py", "tests/faults/test_arguments.py"),
    ),
    "data": (
        "Data with NaN, labels out of range, other dtypes, or empty and ragged batches.",
        ("tests/faults/test_data.py",),
    ),
    "devices": (
        "Eight devices, dp, fsdp and specs of one's own: as one device, through growth, and resumed on 4 and 1.",
        ("tests/shards/test_devices.py",),
    ),
    "processes": (
        "Two processes and four: as one; killed, lost, out of step, failing at the start, told to end.",
        ("tests/shards/test_processes.py", "tests/shards/test_command.py", "tests/shards/test_beginnings.py"),
    ),
}
"""By name: what else is done to runs, and the tests that do it; each case is tried once, and not at random."""
