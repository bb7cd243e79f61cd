"""What a measurement was made on: processor, memory, accelerator, versions. No names of hosts, users or folders."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

PACKAGES = ("esper_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def machine() -> dict[str, Any]:
    """Processor model, cores this process may use, memory in GiB, load when asked, and jax's devices."""
    device = jax.devices()[0]
    found = {
        "processor": _processor(),
        "cores": _cores(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": _load(),
        "platform": device.platform,
        "devices": len(jax.devices()),
    }
    if device.platform != "cpu":
        found["accelerator"] = device.device_kind
    return found


def versions(*more: str) -> dict[str, str]:
    """Python's version and those of the packages that matter, and of `more` where they are installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name not in more:
                found[name] = "not installed"
    return found


def describe(machine: dict[str, Any]) -> str:
    """A machine in a line."""
    parts = [machine["processor"], f"{machine['cores']} cores"]
    if machine["memory_gib"] is not None:
        parts.append(f"{machine['memory_gib']:.0f} GiB")
    if "accelerator" in machine:
        parts.append(f"{machine['devices']} x {machine['accelerator']}")
    else:
        parts.append("no accelerator")
    if machine["load"] is not None:
        parts.append(f"load {machine['load']:.1f} at the start")
    return ", ".join(parts)


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None
