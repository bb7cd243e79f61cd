"""Make RESULTS.md of the JSON files in results/: no figure in it is typed by hand."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from common import markdown
from common.machine import describe
from common.output import roofline_line

HERE = pathlib.Path(__file__).resolve().parent
ORDER = (
    "dormant",
    "seed_cost",
    "convolutions",
    "growth_stall",
    "compile_time",
    "loop",
    "observation",
    "instructions",
    "telemetry",
    "scaling",
    "bridge",
)
HEAD = """# Benchmark results

Written by `benchmarks/report.py` from `benchmarks/results/`; `make bench` measures on this machine and writes both.
Variants are interleaved in one process, ratios are taken within a round; "floor" is how far a second, identical copy
of the base is from it. Times are medians.
"""
NO_GPU = """## GPU

No GPU was available when these were made. On a machine with one, and a jax that knows it, this fills this section:

```sh
make bench BENCH_PLATFORM=gpu BENCH_ARGS="--scale 8 --dtype bfloat16"
.venv/bin/python benchmarks/bridge.py --platform gpu --json benchmarks/results/gpu/bridge.json
.venv/bin/python benchmarks/report.py
```
"""
NEEDED = ("benchmark", "about", "date", "machine", "versions", "options", "tables", "notes")
TITLES = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}


def main() -> None:
    """Read, write, say where."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--results", type=pathlib.Path, default=HERE / "results", help="where the JSON files are")
    made.add_argument("--out", type=pathlib.Path, default=HERE / "RESULTS.md")
    args = made.parse_args()
    found = read(args.results)
    if not found:
        raise SystemExit("there are no results yet: make bench measures, or a script with --json does")
    args.out.write_text(render(found))
    print(f"written: {args.out.name}, of {sum(map(len, found.values()))} result files")


def read(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The results by platform, in order; a file that is none raises a ValueError that names it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for platform in TITLES:
        for path in sorted((folder / platform).glob("*.json")):
            try:
                result = json.loads(path.read_text())
                missing = [key for key in NEEDED if key not in result]
            except ValueError as error:
                raise ValueError(f"{path.name} is not JSON ({error}): remove it or measure again") from error
            if missing:
                raise ValueError(f"{path.name} is no benchmark result, it has no {missing[0]}: remove or rename it")
            found.setdefault(platform, []).append(result)
    place = {name: i for i, name in enumerate(ORDER)}
    return {p: sorted(rs, key=lambda r: place.get(r["benchmark"], len(place))) for p, rs in found.items()}


def render(found: dict[str, list[dict[str, Any]]]) -> str:
    """The whole page."""
    parts = [HEAD]
    for platform, title in TITLES.items():
        if platform in found:
            parts.append(f"## {title}\n")
            parts += [section(result) for result in found[platform]]
        elif platform == "gpu":
            parts.append(NO_GPU)
    return "\n".join(parts).rstrip() + "\n"


def section(result: dict[str, Any]) -> str:
    """One benchmark's part."""
    options = result["options"]
    told = " ".join(f"--{name.replace('_', '-')} {_value(value)}" for name, value in options.items() if _told(value))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"### {result['benchmark']}", "", result["about"], ""]
    lines += [f"{result['date']}. {describe(result['machine'])}. {versions}. `{told}`", ""]
    if result.get("roofline"):
        lines += [roofline_line(result["roofline"], options["dtype"]) + ".", ""]
    for table in result["tables"]:
        lines += [markdown(table), ""]
    for note in result["notes"]:
        lines += [note, ""]
    return "\n".join(lines)


def _told(value: Any) -> bool:
    return value not in (None, False)


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
