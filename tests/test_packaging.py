"""What a wheel holds and what an import costs."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tomllib

import setuptools

ROOT = pathlib.Path(__file__).parents[1]


def test_every_package_is_named_for_the_wheel() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = setuptools.find_packages(str(ROOT), include=["esper_jax", "esper_jax.*"])
    bridge = {f"esper_jax.{name}" for name in setuptools.find_packages(str(ROOT), include=["bridge", "bridge.*"])}
    assert set(named) == {*found, *bridge} and "esper_jax.bridge.ops" in bridge


def test_the_import_is_light() -> None:
    """No torch, matplotlib, scikit-learn, tyro, nor anything of a bus or a dashboard comes with `import esper_jax`."""
    code = "import sys, esper_jax, esper_jax.bridge; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "redis", "matplotlib", "sklearn", "mnist1d", "tyro", "pandas"}
    heavy |= {"tenacity", "tensorboardX", "prometheus_client", "wandb", "jsonschema"}
    assert not set(loaded) & heavy
