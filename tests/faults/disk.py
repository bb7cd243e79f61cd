"""Scenarios of what happens to files and processes; see `scenarios`."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from esper_jax import CheckpointError
from esper_jax.nissa import course, read_events
from esper_jax.tolaria.checkpoint import _SAVING, Checkpoints
from esper_jax.tolaria.run import Run
from esper_jax.tolaria.saving import Saver
from tests.faults.found import ROOT, Found, bits, fit
from tests.tolaria import growing

# --- killed -----------------------------------------------------------------------------------------------------------


AIMS = (None, ("a swap", 3000), None, ("a fossilisation", 20_000), None, ("a tick", 100_000))
"""Where kills fall, in turn: at a random moment, or at one of the first so many calls of functions within something."""


def killed(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """Kill -9 at random moments, half of them in a swap, fossilisation or tick: the run goes on to the same bits."""
    found, cache = Found(), folder / "programs"
    whole = folder / "whole"
    _victim(whole, cache).wait()
    expected = bits(growing.trainer(whole).restore())
    run = 0
    while found.trials < trials:
        directory = folder / f"run{run}"
        run += 1
        while found.trials < trials:
            aim = AIMS[found.trials % len(AIMS)]
            if aim is not None:
                process = _victim(directory, cache, aim[0], str(random.integers(1, aim[1])))
            else:
                process = _victim(directory, cache)
                _until(process, directory / "events.jsonl", float(random.uniform(0, 3)))
                if process.poll() is None:
                    process.kill()
            if process.wait() == 0:  # it came to its end first
                break
            found.expect(process.returncode == -signal.SIGKILL, f"run {run} ended with {process.returncode}")
            found.note(_moment(directory) if aim is None else f"within {aim[0]}")
        if _victim(directory, cache).wait() != 0:
            found.failures.append(f"run {run} cannot go on")
            continue
        found.expect(bits(growing.trainer(directory).restore()) == expected, f"run {run} ended otherwise")
        told = course(read_events(directory / "events.jsonl"))
        found.expect(told == course(read_events(whole / "events.jsonl")), f"run {run} tells another course of events")
    return found


def _moment(directory: pathlib.Path) -> str:
    """What a run's newest seed was at when it was killed, and whether a save was under way."""
    events = list(read_events(directory / "events.jsonl"))
    stages = [e.data["after"] for e in events if e.kind == "stage"]
    awaited = [e.kind for e in events if e.kind in ("swap", "germinated")][-1:] == ["germinated"]
    life = "waiting for its program" if awaited else stages[-1].lower() if stages else "not yet germinated"
    saving = directory / "checkpoints" / _SAVING
    return f"{life}, in a save" if saving.is_dir() and any(saving.iterdir()) else life


def _until(process: subprocess.Popen[bytes], log: pathlib.Path, seconds: float) -> None:
    """Wait until so long after a process wrote to its log, or until its end."""
    size = log.stat().st_size if log.exists() else 0
    while process.poll() is None and not (log.exists() and log.stat().st_size != size):
        time.sleep(0.005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)


def _victim(directory: pathlib.Path, cache: pathlib.Path, *within: str) -> subprocess.Popen[bytes]:
    """A process that begins the small run in that directory, or goes on with it, to its end (see `victim`)."""
    command = [sys.executable, "-m", "tests.faults.victim", str(directory), str(cache), *within]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, **quiet)


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def _flip(path: pathlib.Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[pathlib.Path, np.random.Generator], Any]] = {
    "a bit flipped": _flip,
    "cut to nothing": lambda path, random: path.write_bytes(b""),
    "cut to half": lambda path, random: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "deleted": lambda path, random: path.unlink(),
}


def damaged(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """Each file of a run's newest checkpoint damaged in four ways: the step is skipped by name, or no bit differs."""
    found, whole = Found(), folder / "whole"
    fit(growing.trainer(whole), 5)
    steps = {step: bits(growing.trainer(whole).restore(step=step)) for step in (32, 40)}
    newest = whole / "checkpoints" / "40"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    cases = [(file, name) for file in files for name in DAMAGE]
    for index in random.permutation(len(cases))[:trials]:
        file, name = cases[index]
        copy = folder / "copy"
        shutil.copytree(whole, copy)
        DAMAGE[name](copy / "checkpoints" / "40" / file, random)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            state = growing.trainer(copy).restore()
        step = int(state.step)
        found.expect(bits(state) == steps.get(step), f"{name}: {file}: step {step} came back with other bits")
        said = any("skipped step 40" in str(warning.message) for warning in told)
        found.expect(step == 40 or said, f"{name}: {file}: fell back to step {step} in silence")
        found.note(f"{name}: " + ("the same bits" if step == 40 else "fell back with a warning"))
        shutil.rmtree(copy)
    return found


def all_damaged(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """Every step damaged: one error that lists each and why, and nothing starts afresh."""
    found = Found()
    fit(growing.trainer(folder), 3)
    steps = [path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
    for path in steps:
        file = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        DAMAGE["cut to half"](file, random)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            growing.trainer(folder).restore()
        found.failures.append("a damaged directory was restored")
    except CheckpointError as error:
        why = [rf"step {path.name}: .*(bytes, saved with|cannot be read|crc32)" for path in steps]
        told = [re.search(reason, str(error)) for reason in why]
        found.expect(len(steps) == 3 and all(told), f"not every step is named with a reason: {error}")
        found.note("one error naming all steps and why")
    return found


# --- saves ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes within the block, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_full(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """A disk that is full during a save in the background: told, no bit of the run differs, the next save works."""
    found = Found()
    expected = bits(fit(growing.trainer(None, controller=None), 4)[0].morph)
    for trial in range(trials):
        directory, real = folder / str(trial), Saver._write

        def write(self: Saver, tick: int, *rest: Any, real: Any = real) -> Any:
            with full_disk(int(random.integers(0, 4000))) if tick == 2 else contextlib.nullcontext():
                saved = real(self, tick, *rest)
            if tick == 2:  # at once, before a later save could mend it
                with Checkpoints(self.store.directory) as afresh:
                    found.expect(self.store.latest() == afresh.latest() == 8, f"latest: {self.store.latest()}")
            return saved

        Saver._write = write
        try:
            made = growing.trainer(directory, controller=None)
            state, history = fit(made, 4)
        finally:
            Saver._write = real
        told = [e.data["unsaved"] for e in history.of_kind("error")]
        found.expect(told == [16], f"unsaved steps told: {told}")
        found.expect(bits(state.morph) == expected, "the run trained otherwise")
        with Checkpoints(directory / "checkpoints") as store:
            listed = sorted(int(p.name) for p in store.directory.iterdir() if (p / "manifest.json").exists())
            found.expect(store.latest() == listed[-1] == 32 and listed == [8, 24, 32], f"steps on disk: {listed}")
        found.expect(bits(made.restore().morph) == expected, "the newest step holds another state")
        found.note("told once, the next save is whole")
    return found


def donated(folder: pathlib.Path, random: np.random.Generator, trials: int) -> Found:
    """A save in the background, and at once the step that takes the state's memory: saved is the state before."""
    found, given = Found(), {}
    begin = Run.begin_save

    def begin_save(self: Run, saver: Any, state: Any, session: Any) -> None:
        given[int(state.step)] = bits(state)
        begin(self, saver, state, session)

    Run.begin_save = begin_save
    try:
        made = growing.trainer(folder, checkpoint_every=1, keep=trials + 1)
        fit(made, trials)
    finally:
        Run.begin_save = begin
    found.expect(len(given) >= trials, f"{len(given)} saves in {trials} epochs")
    for step, before in sorted(given.items()):
        found.expect(bits(growing.trainer(folder).restore(step=step)) == before, f"step {step} holds another state")
        found.note("the state as it was")
    found.trials = len(given)
    return found
