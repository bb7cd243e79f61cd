"""The history of a run lies in a file of its own, of which a checkpoint says how much counts."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest

from esper_jax.tolaria.checkpoint import CheckpointWarning
from esper_jax.tolaria.records import FILE, HistoryFile, read_history
from tests.faults.found import bits, fit
from tests.tolaria import growing


def told(history):
    """The records without what the clock says."""
    return [repr({name: value for name, value in r.items() if "seconds" not in name}) for r in history.records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six ticks, with its directory."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *fit(growing.trainer(folder, keep=10), 6)


def go_on(made, directory, step=24):
    state = made.restore(directory, step=step)
    return made.fit(state, growing.TRAIN, growing.VALIDATION, epochs=6)


def test_a_save_costs_the_same_however_long_the_run_is(whole):
    folder, _, history = whole
    metas = [json.loads((folder / "checkpoints" / str(8 * tick) / "manifest.json").read_text()) for tick in (3, 6)]
    sessions = [meta["manifest"]["meta"]["session"] for meta in metas]
    assert [len(session["records"]) for session in sessions] == [1, 1]
    lines = (folder / FILE).read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == history["epoch"] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_goes_on_there_or_elsewhere_has_the_whole_history(whole, tmp_path):
    """From its middle: in a directory of its own, then in that one again, whose file must hold the first ticks too."""
    folder, state, history = whole
    made = growing.trainer(tmp_path, keep=10)
    for directory, step in ((folder, 24), (tmp_path, 40)):
        again, now = go_on(made, directory, step)
        assert bits(again) == bits(state) and told(now) == told(history)
        made = growing.trainer(tmp_path / str(step), keep=10)


def test_a_history_that_is_lost_or_changed_is_told_and_changes_nothing_else(whole, tmp_path):
    folder, state, history = whole
    made = growing.trainer(tmp_path, keep=10)
    text = (folder / FILE).read_bytes()
    try:
        for spoilt in (None, text.replace(b"1", b"2", 1)):
            (folder / FILE).unlink() if spoilt is None else (folder / FILE).write_bytes(spoilt)
            with pytest.warns(RuntimeWarning, match=r"the history of the first 3 ticks is lost: .*history.jsonl"):
                restored = made.restore(folder, step=24)
    finally:
        (folder / FILE).write_bytes(text)
    again, now = made.fit(restored, growing.TRAIN, growing.VALIDATION, epochs=6)
    assert bits(again) == bits(state) and told(now) == told(history)[2:]


def test_lines_of_a_save_that_was_cut_short_are_written_over(tmp_path):
    records = [{"tick": n, "loss": float("nan")} for n in range(5)]
    file = HistoryFile(tmp_path / FILE, [])
    mark, write = file.up_to_now(records[:2])
    write()
    with open(tmp_path / FILE, "ab") as cut:
        cut.write(b'{"tick": 2, "lo')
    later, write = HistoryFile(tmp_path / FILE, records[:2]).up_to_now(records)
    write()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(read_history(tmp_path, mark)) == repr(records[:2])
        assert repr(read_history(tmp_path, later)) == repr(records)


def test_a_second_fit_leaves_the_histories_of_older_checkpoints_as_they_are(tmp_path):
    """It is another session of the same run: its records begin anew, in a file of their own."""
    made = growing.trainer(tmp_path, controller=None)
    state, _ = fit(made, 2)
    state, _ = fit(made, 4, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [made.restore(step=step) for step in (16, 32)]
    _, history = made.fit(found[1], growing.TRAIN, growing.VALIDATION, epochs=5)
    assert history["epoch"] == [3, 4, 5]
    assert sorted(path.name for path in tmp_path.glob("history*")) == ["history-2.jsonl", "history.jsonl"]


def test_a_file_that_is_taken_away_during_the_run_is_written_whole_again(tmp_path):
    records = [{"tick": n} for n in range(4)]
    file = HistoryFile(tmp_path / FILE, [])
    for count, spoil in ((2, (tmp_path / FILE).unlink), (3, lambda: (tmp_path / FILE).write_text("x")), (4, None)):
        mark, write = file.up_to_now(records[:count])
        write()
        assert read_history(tmp_path, mark) == records[:count]
        if spoil is not None:
            spoil()


def test_a_run_whose_newest_step_is_damaged_goes_on_in_place_from_the_one_before(whole, tmp_path):
    """The damaged step is no later run that has to be kept: it is replaced when the run comes there again."""
    folder, state, history = whole
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    largest = max((copy / "checkpoints" / "48").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"")
    made = growing.trainer(copy, keep=10)
    with pytest.warns(CheckpointWarning, match="skipped step 48"):
        restored = made.restore()
    with pytest.warns(CheckpointWarning, match="step 48 .* is damaged and is replaced"):
        again, now = made.fit(restored, growing.TRAIN, growing.VALIDATION, epochs=6)
    assert bits(again) == bits(state) == bits(made.restore()) and told(now) == told(history)
