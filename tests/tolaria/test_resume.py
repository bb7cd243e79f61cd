"""A run that is cut off and resumed ends equal to the bit with one that was not."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from esper_jax import CheckpointError, Stage, TrainingInterrupted, restore_morph
from esper_jax.nissa import course, read_events
from tests.tolaria import growing


def bits(tree: object) -> object:
    """Leaves as numpy, PRNG keys by their data."""
    typed = lambda leaf: hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if typed(leaf) else leaf), tree)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """The uninterrupted run: its directory, final state and history."""
    directory = tmp_path_factory.mktemp("whole")
    made = growing.trainer(directory)
    state, history = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=growing.EPOCHS)
    return directory, state, history


def test_the_run_that_is_resumed_below_has_all_that_could_be_lost(whole) -> None:
    """It has a fossil, a live seed, and was blending at the point where one test kills it."""
    _, state, history = whole
    stages = {int(s) for life in state.morph.state.values() for s in life.stage}
    assert {Stage.FOSSILIZED, Stage.BLENDING} <= stages
    assert stage_at(history, 7) == {"BLENDING"}
    assert stage_at(history, 2) == set()
    assert "FOSSILIZED" in stage_at(history, 11)


def stage_at(history, epoch: int) -> set[str]:
    return {seed["stage"] for seed in history.records[epoch - 1]["seeds"]}


@pytest.mark.parametrize("epoch", [7, 11])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(whole, tmp_path: pathlib.Path, epoch: int) -> None:
    """Before growth, mid-blend, after fossilisation: SIGKILL in a process of its own, then `restore` and `fit` here."""
    _, expected, history = whole
    command = [sys.executable, "-m", "tests.tolaria.growing", str(tmp_path), str(epoch)]
    killed = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    made = growing.trainer(tmp_path)
    restored = made.restore()
    assert int(restored.ticks) == epoch
    state, resumed = made.fit(restored, growing.TRAIN, growing.VALIDATION, epochs=growing.EPOCHS)
    chex.assert_trees_all_equal(bits(state), bits(expected))
    assert course(read_events(tmp_path / "events.jsonl")) == course(read_events(whole[0] / "events.jsonl"))
    assert resumed["score"] == history["score"]


@pytest.mark.parametrize(
    ("number", "word", "handler"),
    [(signal.SIGINT, "interrupted", signal.default_int_handler), (signal.SIGTERM, "terminated", signal.SIG_DFL)],
)
def test_a_signal_in_mid_epoch_saves_and_the_resumed_run_ends_the_same(
    whole, tmp_path: pathlib.Path, number: int, word: str, handler: object
) -> None:
    """Between two steps of epoch 5; the epoch goes on with the batches it had not seen."""
    seen = 0

    def train(epoch: int):
        nonlocal seen
        from esper_jax.tolaria.data import Batches

        for batch in Batches(growing.TRAIN, 32, jax.random.key(1)).epoch(epoch):
            seen += 1
            if seen == 35:
                signal.raise_signal(number)
            yield batch

    made = growing.trainer(tmp_path)
    with pytest.raises(TrainingInterrupted, match=f"{word} at step 35: saved step 35 .*restore") as raised:
        made.fit(growing.start(made), train, growing.VALIDATION, epochs=growing.EPOCHS)
    assert raised.value.signal == number
    assert signal.getsignal(number) == handler, "as before"
    again = growing.trainer(tmp_path)
    restored = again.restore()
    assert (int(restored.step), int(restored.epoch), int(restored.batch)) == (35, 4, 3)
    state, _ = again.fit(restored, growing.TRAIN, growing.VALIDATION, epochs=growing.EPOCHS)
    chex.assert_trees_all_equal(bits(state), bits(whole[1]))


def test_two_runs_from_one_state_are_equal_to_the_bit(whole) -> None:
    made = growing.trainer(None)
    state, _ = made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=growing.EPOCHS)
    chex.assert_trees_all_equal(bits(state), bits(whole[1]))


def test_a_checkpoint_rebuilds_its_morph_without_being_told_the_structure(whole) -> None:
    directory, state, _ = whole
    morph = restore_morph(directory)
    assert morph.spec == state.morph.spec
    chex.assert_trees_all_equal(bits(morph), bits(state.morph))


def test_a_new_run_in_a_directory_with_a_run_is_refused_and_loses_nothing(whole) -> None:
    directory, _, _ = whole
    before = (directory / "events.jsonl").read_bytes()
    made = growing.trainer(directory)
    with pytest.raises(CheckpointError, match="already holds a run up to step"):
        made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=2)
    assert (directory / "events.jsonl").read_bytes() == before


def test_another_run_that_is_as_far_is_not_gone_on_with(whole, tmp_path: pathlib.Path) -> None:
    """What was restored elsewhere would be taken for saved here."""
    first, second = (growing.trainer(tmp_path / name, controller=None) for name in "ab")
    for made in (first, second):
        made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=1)
    with pytest.raises(CheckpointError, match="b already holds a run up to step 8"):
        second.fit(second.restore(tmp_path / "a"), growing.TRAIN, growing.VALIDATION, epochs=2)
    third = growing.trainer(tmp_path / "c", controller=None)
    third.fit(third.restore(tmp_path / "a"), growing.TRAIN, growing.VALIDATION, epochs=1)
    assert int(growing.trainer(tmp_path / "c", controller=None).restore().step) == 8


def test_restoring_from_nothing_or_without_a_directory_says_what_to_do(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="restore\\(\\) needs a directory"):
        growing.trainer(None).restore()
    with pytest.raises(CheckpointError, match="no directory"):
        growing.trainer(None).restore(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in .*empty"):
        growing.trainer(None).restore(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no checkpoint in .*nowhere"):
        restore_morph(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"], "who only looks leaves nothing behind"
