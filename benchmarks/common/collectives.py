"""Bytes that a compiled program sends between devices, read from its text, and what they come to on a larger mesh."""

from __future__ import annotations

import collections
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_WIDTH |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1}
_LINE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")


def results(text: str) -> dict[str, tuple[int, int]]:
    """By kind of collective in a compiled program's text: how many there are, and the bytes of what they result in.

    One inside a loop counts once.
    """
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for line in text.splitlines():
        if match := _LINE.search(line):
            sizes = [
                _WIDTH.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
                for dtype, dims in _ARRAY.findall(match[1])
            ]
            if "-start(" in line:  # its result holds the operand too
                sizes = sizes[len(sizes) // 2 :]
            found[match[2]][0] += 1
            found[match[2]][1] += sum(sizes)
    return {kind: (count, size) for kind, (count, size) in found.items()}


def sent(found: dict[str, tuple[int, int]], devices: int) -> float:
    """Bytes that each device sends by ring algorithms.

    For a result of B bytes over n devices: all-reduce 2 B (n-1)/n, all-gather B (n-1)/n, reduce-scatter B (n-1) (its
    result is one part), all-to-all B (n-1)/n, collective-permute B.
    """
    n = devices
    factor = {
        "all-reduce": 2 * (n - 1) / n,
        "all-gather": (n - 1) / n,
        "reduce-scatter": n - 1,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1.0,
    }
    return sum(factor[kind] * size for kind, (_, size) in found.items()) if n > 1 else 0.0


def on(found: dict[str, tuple[int, int]], devices: int, more: int) -> dict[str, tuple[int, int]]:
    """The same program's collectives on a mesh of `more` devices: what is gathered or reduced whole keeps its size.

    A reduce-scatter's result shrinks with the mesh. That the compiler keeps the same collectives is an assumption.
    """
    return {kind: (n, b * devices // more if kind == "reduce-scatter" else b) for kind, (n, b) in found.items()}
