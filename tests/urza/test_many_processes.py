"""Processes that put, read, remove and sweep one library at once never see or leave a torn seed."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from esper_jax import Urza

from .world import by_hand, same_bits
from .writer import ROUNDS, SEEDS

ROOT = pathlib.Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.urza.writer", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> dict[str, int]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    return json.loads(output)


@pytest.mark.slow
def test_put_read_remove_and_sweep_at_once(tmp_path: pathlib.Path) -> None:
    """Two writers of shared and of own seeds, a reader, a sweeper without grace; a torn read fails its process."""
    root = tmp_path / "seeds"
    others = [start("read", str(root)), start("sweep", str(root))]
    writers = [start("put", str(root), "1"), start("put", str(root), "2")]
    try:
        for writer in writers:
            told(writer)
        (tmp_path / "seeds.stop").touch()
        read, swept = map(told, others)
    finally:
        for process in (*writers, *others):
            process.kill()
    assert read["found"] > 0 and swept["removed"] > 0 and swept["freed"] > 0
    urza = Urza(root)
    numbers = {entry.config["number"]: entry.id for entry in urza.find()}
    assert {1000 * writer + turn for writer in (1, 2) for turn in range(ROUNDS)} <= set(numbers)
    for number, seed_id in numbers.items():
        assert same_bits(urza.get(seed_id).params, by_hand(number).params)
    for number in range(SEEDS):
        urza.put(by_hand(number), measure=False)
    assert len(urza.find()) == 2 * ROUNDS + SEEDS and urza.gc(grace=0).unread == {}


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_library(tmp_path: pathlib.Path) -> None:
    """SIGKILL, three times; what is listed is whole, and the sweeper can lock the library and frees the leavings."""
    for _ in range(3):
        process = start("forever", str(tmp_path))
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        process.kill()
        process.communicate(timeout=30)
        urza = Urza(tmp_path)
        entries, broken = urza.entries()
        assert entries and broken == {}
        for entry in entries:
            urza.verify(entry)
        urza.gc(grace=0)
        assert urza.store.names("tmp") == []
        assert len(urza.store.names("files")) == len(urza.ids()) == len(entries)
