"""What a run survives: every scenario of `tests/faults` in its full form, written to `benchmarks/FAULTS.md`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree
from collections.abc import Sequence
from typing import Any

import numpy as np
from common.machine import describe, machine, versions

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults.scenarios import SCENARIOS, TESTS  # noqa: E402

KNOWN = (*SCENARIOS, *TESTS)
PAGE = ROOT / "benchmarks" / "FAULTS.md"
EXAMPLES = 10
"""How many times the examples of a test run hypothesis draws here."""
INTRODUCTION = """# What a run survives

Written by `python benchmarks/faults.py`; the same scenarios run in a short form with every test run
(`tests/faults/test_scenarios.py`). A failure is anything that a scenario did not expect: other bits, silence where
something had to be told, a wrong step. More of the bus and of libraries of seeds is tested in `tests/oona` and
`tests/urza`.
"""


def main() -> None:
    """Run them, print as they end, and write the page (and JSON)."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--only", nargs="+", choices=KNOWN, default=list(KNOWN), help="what to run")
    made.add_argument("--short", action="store_true", help="as few trials as the tests make")
    made.add_argument("--seed", type=int, default=0, help="of the moments, bits and files that are drawn")
    made.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the results there as JSON")
    made.add_argument("--page", type=pathlib.Path, default=PAGE, metavar="PATH", help="the page to write")
    args = made.parse_args()
    rows: list[dict[str, Any]] = []
    where = machine()
    for name in (name for name in args.only if name in SCENARIOS):
        scenario, full, short = SCENARIOS[name]
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = scenario(pathlib.Path(folder), np.random.default_rng(args.seed), short if args.short else full)
        row = {
            "scenario": name,
            "about": (scenario.__doc__ or "").strip().splitlines()[0],
            "trials": found.trials,
            "seen": dict(found.seen.most_common()),
            "failures": found.failures,
            "seconds": round(time.perf_counter() - began, 1),
        }
        rows.append(row)
        print(f"{name}: {row['trials']} trials in {row['seconds']} s, {len(found.failures)} failures", flush=True)
        for failure in found.failures:
            print(f"  {failure}", flush=True)
    examples = 1 if args.short else EXAMPLES
    shown = [tested(name, *TESTS[name], examples=examples) for name in args.only if name in TESTS]
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"machine": where, "versions": versions(), "rows": rows, "tests": shown}, indent=1) + "\n"
        )
    args.page.write_text(page(rows, shown, describe(where), seed=args.seed))
    print(f"wrote {args.page}")
    sys.exit(1 if any(row["failures"] for row in [*rows, *shown]) else 0)


def tested(name: str, about: str, tests: Sequence[str], *, examples: int) -> dict[str, Any]:
    """Run tests, with so many times the examples that hypothesis draws in CI; how many passed, and which did not."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junitxml={report}", *tests]
        said = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "REQUIRE_REDIS": "1", "FAULTS_EXAMPLES": str(examples)},
            capture_output=True,
            text=True,
        )
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase")) if report.exists() else []
    ended = {case: {child.tag for child in case} & {"failure", "error", "skipped"} for case in cases}
    failures = [f"{case.get('name')}: {', '.join(how)}" for case, how in ended.items() if how]
    if said.returncode and not failures:
        failures = [said.stdout[-500:]]
    row = {
        "tests of": name,
        "about": about,
        "tests": tests,
        "passed": sum(not how for how in ended.values()),
        "failures": failures,
    }
    row["seconds"] = round(time.perf_counter() - began, 1)
    print(f"{name}: {row['passed']} tests passed in {row['seconds']} s, {len(failures)} failures", flush=True)
    return row


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"commit {said.stdout.strip()}" if said.returncode == 0 else "no known commit"


def page(rows: list[dict[str, Any]], shown: list[dict[str, Any]], where: str, *, seed: int) -> str:
    """The results as Markdown."""
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = [INTRODUCTION, f"{datetime.date.today()}, seed {seed}, of {commit()}, on {where}; {named}.\n"]
    text += ["| scenario | what is done to the run | trials | failures | seconds |", "|---|---|---|---|---|"]
    text += [
        f"| {row['scenario']} | {row['about']} | {row['trials']} | {len(row['failures'])} | {row['seconds']:.0f} |"
        for row in rows
    ]
    if shown:
        text += [
            "\n## Tried case by case\n",
            "| | what | tests | passed | failed | seconds |",
            "|---|---|---|---|---|---|",
        ]
    for row in shown:
        named = ", ".join(dict.fromkeys(f"`{test.removeprefix('tests/').partition('::')[0]}`" for test in row["tests"]))
        counts = f"{row['passed']} | {len(row['failures'])} | {row['seconds']:.0f}"
        text.append(f"| {row['tests of']} | {row['about']} | {named} | {counts} |")
    text.append("\n## What happened, how often\n")
    for row in rows:
        text.append(f"- **{row['scenario']}**: " + "; ".join(f"{what} ({n})" for what, n in row["seen"].items()))
        text += [f"  - FAILED: {failure}" for failure in row["failures"]]
    text += [f"- FAILED: {failure}" for row in shown for failure in row["failures"]]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
