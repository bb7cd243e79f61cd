"""Whatever happens to a file of the library is noticed when it is read, named, and changes nothing."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

import esper_jax
from esper_jax import Urza, UrzaError
from esper_jax.kasmina.summary import equal_bits
from esper_jax.urza import DamagedSeed
from esper_jax.urza.record import sha256

from .world import by_hand, host_params, stored

DENSE_0 = esper_jax.morph(host_params()).spec.by_path["Dense_0"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A library with one seed and its program: a record, a note, arrays and a program."""
    root = tmp_path_factory.mktemp("library")
    return root, Urza(root).put(stored("mlp", DENSE_0, hidden=2), contribution=1.5, program=True)


def files(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")


@contextlib.contextmanager
def changed(path: pathlib.Path, data: bytes | None) -> Iterator[None]:
    """The file holds other bytes (None: is gone) for a while."""
    whole = path.read_bytes()
    try:
        path.unlink() if data is None else path.write_bytes(data)
        yield
    finally:
        path.write_bytes(whole)


def refused(
    root: pathlib.Path, seed_id: str, path: pathlib.Path, sentence: str = "damaged|cut short|has grown"
) -> None:
    """Reading the seed raises and names the file."""
    with pytest.raises(DamagedSeed, match=sentence) as caught:
        Urza(root).get(seed_id)
    assert path.relative_to(root).as_posix() in str(caught.value)


def test_the_library_has_every_kind_of_file(library) -> None:
    root, _ = library
    assert [path.relative_to(root).parts[0] for path in files(root)] == ["files", "files", "notes", "seeds"]


def test_a_flipped_bit_in_any_region_of_any_file_is_detected(library) -> None:
    """Every 16th byte and both ends of each file, a different bit each time."""
    root, seed_id = library
    tried = 0
    for path in files(root):
        data = path.read_bytes()
        step = max(16, len(data) // 150)
        for at in {*range(0, len(data), step), 1, 7, 8, len(data) - 1}:
            flipped = bytearray(data)
            flipped[at] ^= 1 << (at // step % 8)
            with changed(path, bytes(flipped)):
                refused(root, seed_id, path, "damaged")
            tried += 1
    assert tried > 250
    assert Urza(root).get(seed_id).contribution == 1.5


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 3), at=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255))
def test_any_changed_byte_is_detected(library, which: int, at: float, byte: int) -> None:
    root, seed_id = library
    path = files(root)[which]
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= byte
    with changed(path, bytes(data)):
        refused(root, seed_id, path, "damaged")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 3), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_detected_and_the_bytes_are_counted(library, which: int, share: float) -> None:
    root, seed_id = library
    path = files(root)[which]
    data = path.read_bytes()
    short = data[: int(share * len(data))]
    with changed(path, short):
        if path.parent.name == "files":
            refused(root, seed_id, path, f"cut short: {len(short)} bytes, expected {len(data)}")
        else:
            refused(root, seed_id, path, f"its {len(short)} bytes have the sha256")


@pytest.mark.parametrize("which", range(4))
def test_a_grown_file_and_one_file_for_another_are_detected(library, which: int) -> None:
    root, seed_id = library
    path = files(root)[which]
    with changed(path, path.read_bytes() + b"\n"):
        refused(root, seed_id, path)
    with changed(path, files(root)[which - 1].read_bytes()):
        refused(root, seed_id, path)


def test_a_lost_file_of_parameters_is_named(library) -> None:
    root, seed_id = library
    for path in files(root)[:2]:
        with changed(path, None):
            refused(root, seed_id, path, r"of seed .* is missing, expected \d+ bytes")


def test_another_seeds_note_does_not_count(library, tmp_path: pathlib.Path) -> None:
    """A whole note in the wrong place is noticed too."""
    root = shutil.copytree(library[0], tmp_path / "copy")
    urza = Urza(root)
    other = urza.put(by_hand(1), contribution=99.0, measure=False)
    (note,) = (root / "notes" / other).iterdir()
    shutil.copy(note, root / "notes" / library[1])
    with pytest.raises(DamagedSeed, match=f"is a note of seed {other[:12]}, not of {library[1][:12]}"):
        urza.get(library[1])


def test_damage_leaves_the_slot_empty_and_the_morph_as_it_was(library) -> None:
    root, seed_id = library
    morph = esper_jax.morph(host_params())
    before = esper_jax.morph(host_params())
    path = files(root)[0]
    with changed(path, path.read_bytes()[:-1]), pytest.raises(DamagedSeed):
        esper_jax.germinate(morph, "Dense_0", Urza(root).get(seed_id))
    assert morph.spec == before.spec and morph.seeds == {} and equal_bits(morph.host, before.host)


def test_a_cached_seed_does_not_hide_damage_from_verify(library) -> None:
    root, seed_id = library
    urza = Urza(root)
    urza.get(seed_id)
    path = files(root)[1]
    with changed(path, path.read_bytes()[:-1]), pytest.raises(DamagedSeed, match="cut short"):
        urza.verify(seed_id)
    urza.verify(seed_id)


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_is_named_with_what_this_version_reads(version, library, tmp_path: pathlib.Path) -> None:
    """A whole record of a later version is no damage: it is never swept."""
    root = shutil.copytree(library[0], tmp_path / "copy")
    record = json.loads((root / "seeds" / f"{library[1]}.json").read_text())
    data = json.dumps({**record, "format": version}).encode()
    later = sha256(data)
    (root / "seeds" / f"{later}.json").write_bytes(data)
    urza = Urza(root)
    with pytest.raises(
        UrzaError, match=rf"{later}.json has format {version!r}, this esper_jax reads format 1"
    ) as caught:
        urza.get(later)
    assert not isinstance(caught.value, DamagedSeed)
    with pytest.warns(UserWarning, match="1 stored seed.* cannot be read.*has format"):
        assert [entry.id for entry in urza.find()] == [library[1]]
    swept = urza.gc(keep=0, damaged=True, grace=0)
    assert set(swept.seeds) == {library[1]} and list(swept.unread) == [later] and later in urza.ids()
    assert len(urza.store.names("files")) == 2  # it may be what the later record names


@pytest.mark.parametrize(
    "body",
    [b"[]", b"{}", b'{"format": 1}', b'{"format": 1, "site": NaN}', b"\x00", b'{"format": 1, "site": {}}', b"[" * 9999],
)
def test_a_file_that_is_no_record_is_one_sentence(body: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / f"{sha256(body)}.json").write_bytes(body)
    with pytest.raises(UrzaError, match=r"seeds/\w+.json (is no record of a seed|was not written by a library)"):
        Urza(tmp_path).get(sha256(body))


def test_gc_sweeps_damaged_seeds_only_when_told_and_frees_nothing_while_one_is_kept(tmp_path: pathlib.Path) -> None:
    urza = Urza(tmp_path)
    ids = [urza.put(by_hand(i), measure=False) for i in range(4)]
    torn_record, torn_arrays, torn_note, whole = ids
    (tmp_path / "seeds" / f"{torn_record}.json").write_bytes(b"{")
    name = next(entry for entry in urza.entries()[0] if entry.id == torn_arrays).files[0].name
    (tmp_path / name).write_bytes(b"")
    (note,) = (tmp_path / "notes" / torn_note).iterdir()
    note.write_bytes(b"{}")
    kept = urza.gc(grace=0)
    assert kept.seeds == kept.files == () and set(kept.unread) == {torn_record, torn_note}
    would = urza.gc(damaged=True, grace=0, dry_run=True)
    swept = urza.gc(damaged=True, grace=0)
    assert set(would.seeds) == set(swept.seeds) == {torn_record, torn_arrays} and swept.unread == {}
    assert sorted(urza.ids()) == sorted([torn_note, whole]) and len(urza.store.names("files")) == 2
    assert urza.get(torn_note).config == {"number": 2}


def test_sweeping_a_directory_that_is_no_library_takes_nothing_away(tmp_path) -> None:
    """Whoever names the wrong directory keeps their own files, old as they may be, whatever the folders are called."""
    strangers = [tmp_path / name for name in ("notes/thesis.txt", "notes/a/b.json", "files/me.jpg", "tmp/work.csv")]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for damaged in (False, True):
        swept = Urza(tmp_path).gc(grace=0, damaged=damaged)
        assert swept.seeds == () and swept.files == ()
    assert all(path.read_text() == "mine" for path in strangers)


def test_a_lost_note_is_told_and_the_program_that_it_named_stays(library) -> None:
    """Only the note says which file is the seed's program; the file itself still says whose it is."""
    root, seed_id = library
    (note,) = (root / "notes").rglob("*.json")
    (program,) = set((root / "files").iterdir()) - {root / Urza(root).entry(seed_id).files[0].name}
    with changed(note, None):
        swept = Urza(root).gc(grace=0.0)
        assert swept.files == () and program.is_file()
        assert "a note was lost" in swept.unread[seed_id] and program.name in swept.unread[seed_id]
    assert Urza(root).gc(grace=0.0).unread == {}


def test_a_program_that_a_newer_one_has_replaced_is_freed(tmp_path: pathlib.Path) -> None:
    urza, seed = Urza(tmp_path), stored("mlp", DENSE_0, hidden=2)
    seed_id = urza.put(seed, program=True, measure=False)
    (old,) = {tmp_path / file.name for file in urza.entry(seed_id).files} - {
        tmp_path / urza.entry(seed_id).file.name  # type: ignore[union-attr]
    }
    whole = urza.get(seed_id)
    import dataclasses

    urza.put(dataclasses.replace(whole, programs={2: b"another"}), measure=False)
    assert old.name in {pathlib.Path(name).name for name in urza.gc(grace=0.0).files}
